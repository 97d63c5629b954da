"""The node schema across ComfyUI releases: options that a release does not know are left out."""

import inspect
from functools import cache

from comfy_api.latest import io

__all__ = ["CATEGORY", "Source", "OptionsType", "RecipeType", "QuantizedType", "CalibrationType", "schema", "widget"]

CATEGORY = "quantization/learned rounding"

Source = io.Custom("LEARNED_ROUNDING_SOURCE")
OptionsType = io.Custom("LEARNED_ROUNDING_OPTIONS")
RecipeType = io.Custom("LEARNED_ROUNDING_RECIPE")
QuantizedType = io.Custom("LEARNED_ROUNDING_QUANTIZED")
CalibrationType = io.Custom("LEARNED_ROUNDING_CALIBRATION")

# Added to ComfyUI after the oldest release we support; they only refine how a node looks.
_NEWER = ("advanced", "search_aliases", "essentials_category")


@cache
def _known(call) -> frozenset[str]:
    return frozenset(inspect.signature(call).parameters)


def _make(call, options: dict):
    known = _known(call)
    return call(**{name: value for name, value in options.items() if name in known or name not in _NEWER})


def widget(kind, **options):
    """An input of type ``kind`` (``io.Int`` …), with the options this ComfyUI knows."""
    return _make(kind.Input, options)


def schema(**options):
    """A node schema, with the options this ComfyUI knows."""
    return _make(io.Schema, {"category": CATEGORY, **options})
