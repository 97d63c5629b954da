"""Quantized files: streaming writer, header metadata, verification, inspection."""

from .inspect import inspect_file
from .metadata import PROVENANCE_KEY, loading_note, provenance
from .verify import verify_file
from .writer import SafetensorsWriter, final_path, header_bytes, keep_apart, remove_leftovers

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
