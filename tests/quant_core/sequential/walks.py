"""Walks through small models, what they give, and the same models run whole."""

import contextlib
import functools
from dataclasses import dataclass, field

import torch
from torch import nn

from learned_rounding.quant_core import Recipe
from learned_rounding.quant_core.events import BlockFinished
from learned_rounding.quant_core.formats import QuantizedWeight
from learned_rounding.quant_core.sequential import ModelWalk, PendingLayer, ReplayedModel
from learned_rounding.quant_core.sequential.calls import replaced_forward
from learned_rounding.quant_core.sequential.streams import Stream

from .models import Pairs, Transformer, UNet, calibrate, make, outputs, pend, replay

W4A8 = Recipe("asym_w4a8_int8", rounding="sequential", preset="none")


INT8 = Recipe(
    "int8_tensorwise", convrot=False, rounding="sequential", preset="none", damping=0.1, sweeps=0
)  # the fastest


FP8 = Recipe("float8_e4m3fn", rounding="sequential", preset="none")


OPTIONS = {
    "rounding": INT8.rounding,
    "capability": None,
    "weights_only": False,
    "seed": 0,
    "emit": lambda event: None,
    "check": lambda: None,
}


NVFP4 = Recipe("nvfp4", rounding="sequential", preset="none")


@dataclass
class Walk:
    """What a walk through a model gave."""

    pending: dict[str, PendingLayer] = field(default_factory=dict)
    results: dict[str, QuantizedWeight] = field(default_factory=dict)
    events: list = field(default_factory=list)
    streams: dict[Stream, dict] = field(default_factory=dict)
    errors: object = None
    unfollowed: str | None = None

    @property
    def finished(self) -> list[BlockFinished]:
        return [event for event in self.events if isinstance(event, BlockFinished)]

    def linears(self, capability=None, *, plain: bool = False, weights_only: bool = False) -> dict:
        """The layers as they run quantized."""
        made = {
            name: pending.linear(pending.plain if plain else self.results[name], capability)
            for name, pending in self.pending.items()
        }
        return {name: linear.without_activations() for name, linear in made.items()} if weights_only else made


def walk(
    model: ReplayedModel,
    recipe=W4A8,
    *,
    capability=None,
    weights_only=True,
    seed=0,
    outside=(),
    left_out=frozenset(),
    calibration=None,
    sensitivity=lambda layer: None,
    check=lambda: None,
) -> Walk:
    """Round all blocks of a model, but no layer of ``left_out``."""
    made, calibration = Walk(), calibration or calibrate(model)
    options = {"rounding": recipe.rounding, "capability": capability, "weights_only": weights_only, "seed": seed}
    options["sensitivity"] = sensitivity
    inside = [name for name in model.layers if name not in ("embed", "final", "modulation")]
    with ModelWalk(model, [*inside, *outside], **options, emit=made.events.append, check=check) as followed:
        for name, pending in pend(model, calibration, recipe, outside).items():
            made.pending[name], made.results[name] = pending, pending.plain
            followed.add_outside(name, pending.plain.codec, parts_of(pending.plain), pending.plain.shape)
        for block in followed.blocks:
            pending = pend(model, calibration, recipe, [name for name in block.layers if name not in left_out])
            made.pending |= pending
            made.results |= followed.round_block(pending)
        made.errors, made.unfollowed = followed.model_errors(), followed.unfollowed
        if followed._streams is not None:
            made.streams = {stream: followed._streams.results(stream) for stream in followed._streams.carried}
    return made


def parts_of(quantized: QuantizedWeight) -> dict[str, torch.Tensor]:
    return {name.rpartition(".")[2]: tensor for name, tensor in quantized.tensors("layer").items()}


def run_whole(model: ReplayedModel, linears) -> dict[int, list[torch.Tensor]]:
    """Outputs of the model in its validation calls with these layers."""
    with contextlib.ExitStack() as stack:
        for name, linear in linears.items():
            stack.enter_context(replaced_forward(model.layers[name], linear))
        return {index: outputs(model.run(index)) for index, judges in enumerate(model.validation) if judges}


def same(left: dict[int, list[torch.Tensor]], right: dict[int, list[torch.Tensor]]) -> bool:
    return left.keys() == right.keys() and all(
        len(left[index]) == len(right[index]) and all(map(torch.equal, left[index], right[index])) for index in left
    )


def relative_error(found: dict[int, list[torch.Tensor]], exact: dict[int, list[torch.Tensor]]) -> float:
    """√ of the mean, over the outputs, of Σ‖y − ŷ‖²/Σ‖y‖²."""
    shares = []
    for position in range(len(next(iter(exact.values())))):
        pairs = [(found[index][position].double(), exact[index][position].double()) for index in exact]
        shares.append(sum((a - b).square().sum() for a, b in pairs) / sum(b.square().sum() for _, b in pairs))
    return float(torch.stack(shares).mean().sqrt())


def state_of(root: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in root.state_dict().items()}


def is_unchanged(root: nn.Module, state: dict[str, torch.Tensor]) -> bool:
    return (
        not any("forward" in vars(module) for module in root.modules())
        and not any(module._forward_hooks or module._forward_pre_hooks for module in root.modules())
        and all(torch.equal(tensor, state[name]) for name, tensor in root.state_dict().items())
    )


def same_bytes(left: Walk, right: Walk) -> bool:
    return left.results.keys() == right.results.keys() and all(
        all(map(torch.equal, parts_of(left.results[name]).values(), parts_of(right.results[name]).values()))
        for name in left.results
    )


KINDS = {
    "shared modulation": lambda: Transformer(2),
    "in-place blocks": lambda: Transformer(2, in_place=True),
    "keyword arguments": lambda: Transformer(2, keywords=True),
    "two outputs": Pairs,
    "skips": UNet,
    "skips, children called": lambda: UNet(children=True),
}


@functools.cache
def walked(kind: str, recipe: Recipe = W4A8) -> tuple[ReplayedModel, Walk]:
    """A model and its walk, made once for the tests that only read it."""
    model = replay(make(KINDS[kind]))
    return model, walk(model, recipe)


def block_outputs(model: ReplayedModel, linears, *, validation: bool = True) -> dict[int, list[torch.Tensor]]:
    """Outputs of the first block in the whole model."""
    found: list[list[torch.Tensor]] = []
    first = {name: linear for name, linear in linears.items() if name.startswith("blocks.0.")}
    hook = model.root.blocks[0].register_forward_hook(lambda _, args, value: found.append(outputs(value)))
    try:
        with contextlib.ExitStack() as stack:
            for name, linear in first.items():
                stack.enter_context(replaced_forward(model.layers[name], linear))
            calls = [index for index, judges in enumerate(model.validation) if judges == validation]
            for index in calls:
                model.run(index)
    finally:
        hook.remove()
    return dict(zip(calls, found, strict=True))
