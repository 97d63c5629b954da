"""Quantized files: streaming writer, header metadata, verification, inspection."""

from .inspect import inspect_file
from .layout import header_bytes
from .metadata import PROVENANCE_KEY, loading_note, provenance
from .partial import remove_leftovers
from .publish import final_path, keep_apart
from .verify import verify_file
from .writer import SafetensorsWriter

__all__ = [
    "PROVENANCE_KEY",
    "SafetensorsWriter",
    "final_path",
    "header_bytes",
    "inspect_file",
    "keep_apart",
    "loading_note",
    "provenance",
    "remove_leftovers",
    "verify_file",
]
