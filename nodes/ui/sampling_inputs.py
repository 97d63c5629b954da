"""Inputs of nodes that sample as KSampler does. Each input is a list."""

from collections.abc import Sequence
from typing import Any

from comfy_api.latest import io

from ...quant_core.errors import RecipeError
from .. import host
from .schema import widget

__all__ = ["pair_conditioning", "sampling_inputs", "single_value"]

_AS_KSAMPLER = "As for KSampler."


def sampling_inputs(positive: str, seed: str, steps: str) -> list:
    """Return the inputs from conditioning to scheduler; the arguments are tooltips that differ from KSampler's."""
    return [
        io.Conditioning.Input("positive", tooltip=positive),
        io.Conditioning.Input("negative", tooltip="As for KSampler; one for all, or one for each positive."),
        io.Latent.Input("latent_image", tooltip="As for KSampler; of the size, length and kind you use."),
        widget(io.Int, id="seed", default=0, min=0, max=0xFFFFFFFFFFFFFFFF, control_after_generate=False, tooltip=seed),
        widget(io.Int, id="steps", default=20, min=1, max=10000, tooltip=steps),
        widget(io.Float, id="cfg", default=8.0, min=0.0, max=100.0, step=0.1, round=0.01, tooltip=_AS_KSAMPLER),
        widget(io.Combo, id="sampler_name", options=list(host.samplers), tooltip=_AS_KSAMPLER),
        widget(io.Combo, id="scheduler", options=list(host.schedulers), tooltip=_AS_KSAMPLER),
    ]


def pair_conditioning(positive: list, negative: list) -> list[tuple]:
    """Pair each positive with its negative conditioning; the last negative one is repeated."""
    return [(conditioning, negative[min(index, len(negative) - 1)]) for index, conditioning in enumerate(positive)]


def single_value(name: str, values: Sequence | None) -> Any:
    """Return the value of an input that accepts one value; None if it is not connected.

    Raises:
        RecipeError: several values are connected.
    """
    if values is None:
        return None
    if len(values) != 1:
        raise RecipeError(f"Input {name} accepts one value, but {len(values)} are connected; connect a single one.")
    return values[0]
