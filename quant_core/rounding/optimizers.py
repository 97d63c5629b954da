"""Optimizers and learning-rate schedules of gradient-based rounding."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from ..errors import MissingPackageError

__all__ = ["OPTIMIZERS", "SCHEDULES", "OptimizerChoice", "Original", "Schedule", "set_mode"]


class Original(torch.optim.Optimizer):
    """Steps of fixed length along the gradient: x ← x − lr·√n·g/‖g‖, so that lr is the root mean square of a step."""

    def __init__(self, params, lr: float):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for x in group["params"]:
                norm = torch.linalg.vector_norm(x.grad)
                # Without a gradient, as with an exactly representable weight, there is nowhere to go.
                x.sub_(x.grad * (group["lr"] * x.numel() ** 0.5 / norm.clamp_min(torch.finfo(norm.dtype).tiny)))


def _prodigy(params, lr: float) -> torch.optim.Optimizer:
    try:
        from prodigyplus.prodigy_plus_schedulefree import ProdigyPlusScheduleFree
    except ImportError:
        raise MissingPackageError(
            "The optimizer 'prodigy' needs a package that is not installed here: run "
            "'pip install prodigy-plus-schedule-free' in ComfyUI's Python, or choose another optimizer."
        ) from None
    return ProdigyPlusScheduleFree(params, lr=lr, split_groups=False, use_stableadamw=False)


@dataclass(frozen=True)
class OptimizerChoice:
    """``make(params, lr)``; ``lr`` and ``schedule``: what it takes when the user names none."""

    make: Callable[..., torch.optim.Optimizer]
    lr: float
    schedule: str


# Weight decay would pull every weight towards its lower code, so there is none.
OPTIMIZERS: Mapping[str, OptimizerChoice] = {
    "original": OptimizerChoice(Original, 0.02, "adaptive"),
    "adamw": OptimizerChoice(
        lambda params, lr: torch.optim.AdamW(params, lr=lr, weight_decay=0.0), 0.05, "exponential"
    ),
    "radam": OptimizerChoice(lambda params, lr: torch.optim.RAdam(params, lr=lr), 0.05, "exponential"),
    "prodigy": OptimizerChoice(_prodigy, 1.0, "plateau"),
}


def set_mode(optimizer: torch.optim.Optimizer, mode: str) -> None:
    """Switch a schedule-free optimizer between its averaged weights ("eval") and those that it steps ("train")."""
    switch = getattr(optimizer, mode, None)
    if switch is not None:
        switch()


class Schedule(ABC):
    """Changes the learning rate after each step; depends on what happened so far, never on how many steps will follow."""

    def __init__(self, optimizer: torch.optim.Optimizer):
        self._optimizer = optimizer

    def _multiply(self, factor: float) -> None:
        for group in self._optimizer.param_groups:
            group["lr"] *= factor

    @abstractmethod
    def step(self, improved: bool, since: int) -> None:
        """``improved``: the step gave a new best; ``since``: steps since the best before it, or since the best."""


class _Adaptive(Schedule):
    """The published method's own: the rate grows on a new best, the more the longer it took, and shrinks otherwise."""

    _GROW = ((50, 1.25), (75, 1.375), (100, 1.5), (125, 1.75), (150, 2.0), (200, 2.25), (250, 2.5), (300, 2.75))
    _SHRINK = (
        (26, 0.95), (51, 0.97), (76, 0.985), (101, 0.9875), (151, 0.98875), (201, 0.99), (251, 0.99125), (301, 0.9925),
    )  # fmt: skip

    def step(self, improved: bool, since: int) -> None:
        table, last = (self._GROW, 3.0) if improved else (self._SHRINK, 0.995)
        self._multiply(next((factor for limit, factor in table if since < limit), last))


class _Exponential(Schedule):
    """Half the rate after every 200 steps."""

    def step(self, improved: bool, since: int) -> None:
        self._multiply(0.5 ** (1 / 200))


class _Plateau(Schedule):
    """5 % less after every 10 steps without a new best."""

    def step(self, improved: bool, since: int) -> None:
        if not improved and since % 10 == 0:
            self._multiply(0.95)


SCHEDULES: Mapping[str, type[Schedule]] = {"adaptive": _Adaptive, "exponential": _Exponential, "plateau": _Plateau}
