"""Answer the page's question what Learned Round Quantize will do, from the values of the connected nodes, before anything runs."""

from collections.abc import Mapping
from typing import Any

from ...quant_core import Recipe
from ...quant_core.errors import QuantizationError
from .. import host
from ..configure import ConfigureQuantization
from ..options import RoundingOptions

__all__ = ["ROUTE", "add_preview_route"]

ROUTE = "/learned_rounding/preview"
_BODY = 300_000  # bytes; a keep list and a layer_config are as long as a recipe may be
_INVALID = (
    f"{ROUTE} requires the values of Load Model, Configure Quantization and Rounding Options as their nodes have them."
)
_SWITCHES = ("requantize", "calibrated", "general")


def add_preview_route() -> None:
    """Add the route to which pages send the values of the nodes."""
    host.add_value_route(ROUTE, _answer, limit=_BODY, in_thread=True)


def _answer(request: object) -> dict[str, object]:
    """Sizes, layers, formats and time of a run, or one sentence that says why it would be refused.

    Args:
        request: "model" ("folder/name"), "recipe" and "options": inputs of Configure Quantization and Rounding Options by name, null
            for one that is not connected; switches "requantize", "calibrated" (a calibration is connected) and "general".

    Raises:
        ValueError: a request that no page sends.
    """
    if not isinstance(request, dict) or not isinstance(request.get("model"), str):
        raise ValueError(_INVALID)
    switches = {name: bool(request.get(name)) for name in _SWITCHES}
    try:
        recipe = _make_recipe(request.get("recipe"), request.get("options"))
        file = host.FileSource.choose(request["model"], "", switches.pop("requantize"))
        found = host.preview_file(file, recipe, **switches)
    except (QuantizationError, OSError) as error:  # OSError: the file was removed meanwhile
        return {"error": host.shorten_paths(str(error))}
    except (TypeError, AttributeError):
        raise ValueError(_INVALID) from None
    return {
        "source": file.path.name,
        "bytes_in": found.bytes_in,
        "bytes_out": found.bytes_out,
        "layers": found.layers,
        "unquantized": found.unquantized,
        "formats": [[name, count, *host.find_stock_support(codec)] for name, (codec, count) in found.formats.items()],
        "seconds": found.seconds,
        "device": host.describe_device(),
    }


def _make_recipe(values: Mapping[str, Any] | None, options: Mapping[str, Any] | None) -> Recipe:
    """The recipe that Configure Quantization makes of its inputs; that of all defaults without it."""
    if values is None:
        return Recipe()
    chosen = RoundingOptions.execute(**options).args[0] if options else None
    return ConfigureQuantization.execute(**{**values, "options": chosen}).args[0]
