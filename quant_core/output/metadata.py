"""Header entries of a quantized file: what made it, and what loads it."""

from collections.abc import Mapping

from ..formats import READABLE
from ..formats.layer_json import parse_object
from ..sources import Source

__all__ = ["ENCODER_PREFIX", "NOTE_KEY", "PROVENANCE_KEY", "loading_note", "provenance"]

PROVENANCE_KEY = "learned_rounding"  # version, recipe and fingerprint of the run
NOTE_KEY = "note"  # for people whose ComfyUI does not load the file
ENCODER_PREFIX = "text_encoders."  # of text encoders in a whole checkpoint
_HOMEPAGE = "https://github.com/learned-rounding/learned_rounding"


def loading_note(configs: Mapping[str, dict[str, object]]) -> dict[str, str]:
    """The header entry that names what loads the file; none where stock ComfyUI does. ``configs``: {layer: JSON}."""
    formats = {str(config["format"]) for config in configs.values()}
    ours = sorted(name for name in formats if name in READABLE and READABLE[name].stock_since is None)
    text = f"ComfyUI loads {', '.join(ours)} layers with the node pack Learned Rounding installed: {_HOMEPAGE}"
    return {NOTE_KEY: text} if ours else {}


def provenance(source: Source) -> dict:
    """The entry that this project writes into the header; empty for other files."""
    text = source.metadata.get(PROVENANCE_KEY)
    return parse_object(text, f"{source.name}: header entry {PROVENANCE_KEY}") if text else {}
