"""Reconstruction of a block: roundings of its layers, learned by gradient on the block's output.

A weight w that was rounded to q has its other neighbour a on the far side, and the position (w/s − q)/(a − q), which exceeds ½
where GPTQ has rounded away from w. Weights with a position above ½ − τ are near a tie. Each of them has an offset x that
starts at its position, or just below ½; it is rounded to a where x > ½, and to q elsewhere. All others keep q. Minimised is

    Σ over calls and outputs of ‖ŷ − y‖²/‖y‖²                                                                          (1)

with the gradient passed straight through the rounding of weights and of activations (arXiv 1308.3432). Every step uses one
calibration call; the start and a state every few steps are judged on the validation calls, and the best of them is kept.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch

from ..cancellation import CancelCheck
from ..formats import QuantizedWeight
from ..rounding import OPTIMIZERS, SCHEDULES, RoundingConfig
from ..rounding.optimizers import set_mode
from .gradients import UndifferentiableError, deterministic_kernels, find_backends
from .learned import LearnedLayer, Offsets, RoundedLayer
from .linear import LinearFunction

__all__ = ["BlockCalls", "Reconstruction", "RoundedLayer", "reconstruct_block"]

_STEPS = 120  # if num_iter is not given
_STEPS_PER_JUDGEMENT = 10
# Learning rates in units of the distance of two neighbours. Those of :data:`OPTIMIZERS` are for exact gradients.
_RATES: Mapping[str, float] = {"original": 0.002, "adamw": 0.004, "radam": 0.05, "prodigy": 1.0}


class BlockCalls(Protocol):
    """The recorded calls of one block.

    Attributes:
        calibration: indices of the calls that are learned from.
        validation: indices of the calls that only judge.
    """

    @property
    def calibration(self) -> Sequence[int]: ...

    @property
    def validation(self) -> Sequence[int]: ...

    def run(self, call: int, linears: Mapping[str, LinearFunction]) -> Sequence[torch.Tensor]:
        """Outputs of the block for its inputs in the quantized model, with these layers replaced.

        Called outside of inference mode, with and without grad mode; no tensor of it may be an inference tensor.
        """
        ...

    def target(self, call: int) -> Sequence[torch.Tensor]:
        """Outputs of the block in the original model."""
        ...


@dataclass(frozen=True)
class Reconstruction:
    """The result of :func:`reconstruct_block`.

    Attributes:
        quantized: name of a layer → its result. Errors of the outputs of learned layers are unknown.
        before, after: relative errors of the block's outputs in the validation calls.
        refused: why the block keeps its start, part of a sentence; None where it was learned.
    """

    quantized: Mapping[str, QuantizedWeight]
    before: float
    after: float
    refused: str | None = None


@torch.inference_mode(False)  # ComfyUI's nodes run in inference mode, in which autograd does not work
@torch.no_grad()
def reconstruct_block(
    calls: BlockCalls,
    layers: Mapping[str, RoundedLayer],
    rounding: RoundingConfig,
    *,
    capability: tuple[int, int] | None,
    weights: Mapping[int, float] | None = None,
    linears: Mapping[str, LinearFunction] | None = None,
    seed: int = 0,
    check: CancelCheck = lambda: None,
    on_step: Callable[[int, int], None] = lambda step, total: None,
) -> Reconstruction:
    """Learn the layers of a block; never worse than the start on the validation calls.

    Args:
        layers: by the names that :meth:`BlockCalls.run` takes.
        rounding: its options optimizer (default adamw), num_iter, lr, lr_schedule (default: linear to zero) and early_stop.
        capability: compute capability that activations are quantized for; None for a card that multiplies the formats.
        weights: weight of each call in the loss; None for 1.
        linears: further layers that are replaced.
        seed: of the order of the calls.
        check: called in every step; raise in it to cancel.
        on_step: called after each step with their number so far and in all.
    """
    learned = {name: LearnedLayer(layer, capability) for name, layer in layers.items()}
    offsets = Offsets(learned)
    objective = _Objective(calls, weights, linears or {}, check)
    before = objective.error(offsets.linears())
    start = {name: layer.quantized for name, layer in layers.items()}
    if not (before and calls.calibration and offsets.x.numel()):
        return Reconstruction(start, before, before)
    try:
        loss = partial(objective.loss, calls.calibration[0])
        backends = find_backends(lambda: [offsets.gradient(loss)])
        with deterministic_kernels(backends):
            after = _learn(offsets, objective, before, rounding, seed, on_step)
    except UndifferentiableError as error:
        return Reconstruction(start, before, before, refused=str(error))
    except torch.OutOfMemoryError:
        return Reconstruction(start, before, before, refused="the device has too little memory for its backward pass")
    if after >= before:
        return Reconstruction(start, before, before)
    return Reconstruction(offsets.results(), before, after)


def _learn(
    offsets: Offsets,
    objective: "_Objective",
    best: float,
    rounding: RoundingConfig,
    seed: int,
    on_step: Callable[[int, int], None],
) -> float:
    """Learn the offsets and leave the best state in them; returns its error, ``best`` where none is better."""
    name, steps = rounding.optimizer or "adamw", _STEPS if rounding.num_iter is None else rounding.num_iter
    rate = _RATES[name] if rounding.lr is None else rounding.lr
    solver = OPTIMIZERS[name].make([offsets.x], lr=rate)
    schedule = SCHEDULES[rounding.lr_schedule](solver) if rounding.lr_schedule else None
    order = _shuffle(objective.calls.calibration, seed)
    unit, kept, since = 0.0, offsets.x.detach().clone(), 0
    for step in range(steps):
        gradient = offsets.gradient(partial(objective.loss, next(order)))
        unit = unit or float(gradient.square().mean(dtype=torch.float64).sqrt()) or 1.0
        offsets.descend(solver, gradient, unit)
        judged = (step + 1) % _STEPS_PER_JUDGEMENT == 0 or step + 1 == steps
        improved = False
        if judged:
            set_mode(solver, "eval")
            error = objective.error(offsets.linears())
            improved = error < best
            if improved:
                best, kept = error, offsets.x.detach().clone()
            set_mode(solver, "train")
        if schedule:
            schedule.step(improved, since)
        else:
            for group in solver.param_groups:
                group["lr"] = rate * (1 - (step + 1) / steps)
        since = 0 if improved else since + 1
        on_step(step + 1, steps)
        if judged and rounding.early_stop and since >= rounding.early_stop:
            break
    offsets.x.copy_(kept)
    return best


class _Objective:
    """(1) of single calls, relative to the outputs of the validation calls."""

    def __init__(
        self,
        calls: BlockCalls,
        weights: Mapping[int, float] | None,
        linears: Mapping[str, LinearFunction],
        check: CancelCheck,
    ):
        self.calls, self._weights, self._linears, self._check = calls, weights, linears, check
        totals = [
            torch.stack([self._weight(call) * _energy(output) for output in _floating(calls.target(call))])
            for call in calls.validation
        ]
        self._totals = torch.stack(totals).sum(dim=0).clamp_min(1e-300) if totals else torch.ones(())

    def loss(self, call: int, linears: Mapping[str, LinearFunction]) -> torch.Tensor:
        """Mean over outputs of the squared error of one call, float64; relative to all validation calls."""
        self._check()
        found = _floating(self.calls.run(call, {**self._linears, **linears}))
        errors = [
            _energy(a.float() - b.float()) for a, b in zip(found, _floating(self.calls.target(call)), strict=True)
        ]
        return (self._weight(call) * torch.stack(errors) / self._totals).mean()

    def error(self, linears: Mapping[str, LinearFunction]) -> float:
        """Relative error of the outputs of the validation calls, not squared."""
        return sum(float(self.loss(call, linears)) for call in self.calls.validation) ** 0.5

    def _weight(self, call: int) -> float:
        return 1.0 if self._weights is None else self._weights[call]


def _floating(outputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return [output for output in outputs if output.is_floating_point()]


def _energy(values: torch.Tensor) -> torch.Tensor:
    """‖values‖², float64 (); summed per row, so that no sum depends on the number of threads."""
    return values.float().square().sum(dim=-1).double().sum()


def _shuffle(calls: Sequence[int], seed: int) -> Iterator[int]:
    """The calls in random order, again and again."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from (calls[index] for index in torch.randperm(len(calls), generator=generator).tolist())
