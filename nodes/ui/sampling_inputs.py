"""Inputs of the nodes that sample as KSampler does, each of them a list."""

from comfy_api.latest import io

from ...quant_core.errors import RecipeError
from .. import host
from .schema import widget

__all__ = ["only", "pairs", "sampling_inputs"]

_AS_KSAMPLER = "As for KSampler."


def sampling_inputs(positive: str, seed: str, steps: str) -> list:
    """From conditioning to scheduler; what their tooltips say where it is not KSampler's."""
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


def pairs(positive: list, negative: list) -> list[tuple]:
    """Each positive conditioning with its negative one, the last of which serves those left over."""
    return [(each, negative[min(index, len(negative) - 1)]) for index, each in enumerate(positive)]


def only(name: str, values):
    """The one value of an input that takes no list; None when it is not connected."""
    if values is None:
        return None
    if len(values) != 1:
        raise RecipeError(f"This node takes one {name}, and {len(values)} are connected; connect a single one.")
    return values[0]
