"""Header entries of a quantized file: what made it, and what loads it."""

from collections.abc import Iterable, Mapping

from ..display import three_digits
from ..formats import READABLE
from ..formats.layer_json import parse_object
from ..formats.table import newest_release
from ..sources import Source

__all__ = [
    "ENCODER_PREFIX",
    "MODEL_RUN_KEY",
    "NOTE_KEY",
    "PROVENANCE_KEY",
    "describe_model_run",
    "loading_note",
    "provenance",
]

PROVENANCE_KEY = "learned_rounding"  # version, recipe and fingerprint of the run
MODEL_RUN_KEY = "sequential"  # in it: what a rounding that ran the model recorded
NOTE_KEY = "note"  # for people whose ComfyUI does not load the file
ENCODER_PREFIX = "text_encoders."  # of text encoders in a whole checkpoint
_LARGEST = 1e6  # error or number of calls that is shown
_HOMEPAGE = "https://github.com/learned-rounding/learned_rounding"
_PACK = f"the node pack Learned Rounding installed: {_HOMEPAGE}"


def loading_note(configs: Mapping[str, dict[str, object]], kitchens: Iterable[str | None] = ()) -> dict[str, str]:
    """The header entry that names what loads the file; none where stock ComfyUI does.

    Args:
        configs: {layer: JSON}.
        kitchens: :attr:`~.codec.Codec.kitchen_since` of the layers.
    """
    formats = {str(config["format"]) for config in configs.values()}
    ours = sorted(name for name in formats if name in READABLE and READABLE[name].stock_since is None)
    if ours:
        return {NOTE_KEY: f"ComfyUI loads {', '.join(ours)} layers with {_PACK}"}
    kitchen = newest_release(kitchens)
    return {NOTE_KEY: f"ComfyUI loads it with comfy-kitchen {kitchen} or newer, or with {_PACK}"} if kitchen else {}


def provenance(source: Source) -> dict:
    """The entry that this project writes into the header; empty for other files."""
    text = source.metadata.get(PROVENANCE_KEY)
    return parse_object(text, f"{source.name}: header entry {PROVENANCE_KEY}") if text else {}


def describe_model_run(values: object) -> str:
    """What a rounding that ran the model recorded, for people.

    "error 0.0684 as run on SM 9.0, 0.0651 on cards that do not quantize activations; 64 recorded calls"

    Args:
        values: those of :data:`MODEL_RUN_KEY`, which a file of unknown origin may have too; what is invalid is left out.
    """
    if not isinstance(values, Mapping):
        return ""
    error, only, calls = (_number(values.get(key)) for key in ("output_error", "weights_only_error", "calls"))
    if error is None:
        return f"{values.get('unfollowed') or 'error not measured'}; layers are calibrated one by one"
    card = values.get("card")
    where = "where the format is multiplied" if card == "native" else f"on SM {card}"
    without = "" if only is None else f", {three_digits(only)} on cards that do not quantize activations"
    return f"error {three_digits(error)} as run {where}{without}" + (
        "" if calls is None else f"; {calls:.0f} recorded calls"
    )


def _number(value: object) -> float | None:
    return value if isinstance(value, int | float) and abs(value) < _LARGEST else None
