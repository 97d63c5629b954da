"""Header entries of a quantized file: what made it, and what loads it."""

from collections.abc import Iterable, Mapping

from ..formats import READABLE
from ..formats.layer_json import parse_object
from ..formats.table import newest_release
from ..sources import Source

__all__ = ["ENCODER_PREFIX", "NOTE_KEY", "PROVENANCE_KEY", "loading_note", "provenance"]

PROVENANCE_KEY = "learned_rounding"  # version, recipe and fingerprint of the run
NOTE_KEY = "note"  # for people whose ComfyUI does not load the file
ENCODER_PREFIX = "text_encoders."  # of text encoders in a whole checkpoint
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
