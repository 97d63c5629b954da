"""Node schemas for all supported ComfyUI releases: options that a release does not have are omitted."""

import inspect
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

from comfy_api.latest import io

from ...quant_core.errors import QuantizationError

__all__ = [
    "CATEGORY",
    "CalibrationType",
    "ComparisonType",
    "OptionsType",
    "QuantizedType",
    "RecipeType",
    "Source",
    "check_inputs",
    "schema",
    "widget",
]

CATEGORY = "quantization/learned rounding"

Source = io.Custom("LEARNED_ROUNDING_SOURCE")
OptionsType = io.Custom("LEARNED_ROUNDING_OPTIONS")
RecipeType = io.Custom("LEARNED_ROUNDING_RECIPE")
QuantizedType = io.Custom("LEARNED_ROUNDING_QUANTIZED")
ComparisonType = io.Custom("LEARNED_ROUNDING_COMPARISON")
CalibrationType = io.Custom("LEARNED_ROUNDING_CALIBRATION")

# Node id → words that the node search finds it by, besides its title. Pages read the same file: older frontends search titles only.
_SEARCH_ALIASES = json.loads((Path(__file__).parents[2] / "web" / "search_aliases.json").read_text(encoding="utf-8"))

# Options of later releases than the oldest supported one; they affect the appearance of a node only.
_NEWER = ("advanced", "search_aliases", "essentials_category")


@cache
def _parameters(call) -> frozenset[str]:
    return frozenset(inspect.signature(call).parameters)


def _call_with_supported(call, options: dict):
    """Call with ``options``, without newer ones that this release does not have."""
    supported = _parameters(call)
    return call(**{name: value for name, value in options.items() if name in supported or name not in _NEWER})


def widget(kind, matters_for: list[dict] | None = None, **options):
    """An input of type ``kind`` (``io.Int`` …) with the options that this ComfyUI supports.

    Args:
        matters_for: conditions under which the input has an effect, if it depends on others. One condition must hold; a
            condition is ``{other input: [values]}`` or ``{other input: {"not": [values]}}`` for all inputs that it names.
            Pages hide the widget where none holds, and send its default (``web/dependent_options.js``).
    """
    made = _call_with_supported(kind.Input, options)
    if matters_for is not None:  # older releases do not have the parameter extra_dict
        made.extra_dict = {**made.extra_dict, "matters_for": matters_for}
    return made


def schema(node_id: str, display_name: str, **options):
    """A node schema with the options that this ComfyUI supports.

    The English title is a search alias, because a page in another language searches its own titles.
    """
    aliases = [display_name, *_SEARCH_ALIASES[node_id]]
    return _call_with_supported(
        io.Schema,
        {
            "node_id": node_id,
            "display_name": display_name,
            "category": CATEGORY,
            "search_aliases": aliases,
            **options,
        },
    )


def check_inputs(check: Callable, *values) -> bool | str:
    """Result of ``validate_inputs``: True where ``check(*values)`` succeeds, else the message of its error.

    A value of None comes from another node and is checked when the workflow runs.
    """
    try:
        if None not in values:
            check(*values)
    except QuantizationError as error:
        return str(error)
    return True
