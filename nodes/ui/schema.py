"""The node schema across ComfyUI releases: options that a release does not know are left out."""

import inspect
from collections.abc import Callable, Sequence
from functools import cache

from comfy_api.latest import io

from ...quant_core.errors import QuantizationError

__all__ = [
    "CATEGORY",
    "Source",
    "OptionsType",
    "RecipeType",
    "QuantizedType",
    "CalibrationType",
    "checked",
    "schema",
    "widget",
]

CATEGORY = "quantization/learned rounding"

Source = io.Custom("LEARNED_ROUNDING_SOURCE")
OptionsType = io.Custom("LEARNED_ROUNDING_OPTIONS")
RecipeType = io.Custom("LEARNED_ROUNDING_RECIPE")
QuantizedType = io.Custom("LEARNED_ROUNDING_QUANTIZED")
CalibrationType = io.Custom("LEARNED_ROUNDING_CALIBRATION")

_WANTED = ("fp8", "int8", "convert", "quantize")

# Added to ComfyUI after the oldest release we support; they only refine how a node looks.
_NEWER = ("advanced", "search_aliases", "essentials_category")


@cache
def _known(call) -> frozenset[str]:
    return frozenset(inspect.signature(call).parameters)


def _make(call, options: dict):
    known = _known(call)
    return call(**{name: value for name, value in options.items() if name in known or name not in _NEWER})


def widget(kind, matters_for: list[dict] | None = None, **options):
    """An input of type ``kind`` (``io.Int`` …), with the options this ComfyUI knows.

    Args:
        matters_for: when the input acts, if that depends on others: one of these must hold, each of them
            ``{other input: [values]}`` or ``{other input: {"not": [values]}}`` for every input that it names. Pages hide
            the widget where none does, and send its default (``web/dependent_options.js``).
    """
    made = _make(kind.Input, options)
    if matters_for is not None:
        made.extra_dict = {
            **made.extra_dict,
            "matters_for": matters_for,
        }  # older releases do not take it as an argument
    return made


def schema(search_aliases: Sequence[str] = (), **options):
    """A node schema, with the options this ComfyUI knows. Every node is found by what users want and by ``search_aliases``."""
    return _make(io.Schema, {"category": CATEGORY, "search_aliases": [*search_aliases, *_WANTED], **options})


def checked(check: Callable, *values) -> bool | str:
    """What ``validate_inputs`` answers before a workflow runs: whether ``check`` takes these values, else its error's sentence.

    None among the values comes from another node: the run checks it.
    """
    try:
        if None not in values:
            check(*values)
    except QuantizationError as error:
        return str(error)
    return True
