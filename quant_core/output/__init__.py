"""Quantized files: streaming writer, header metadata, verification, inspection."""

from .disk_space import check_disk_space, find_disk
from .inspect import inspect_file
from .layout import header_bytes
from .metadata import PROVENANCE_KEY, loading_note, provenance
from .partial import leftover_bytes, lock_file, remove_leftovers
from .publish import check_name, final_path, keep_apart
from .verify import verify_file
from .writer import SafetensorsWriter

__all__ = [
    "PROVENANCE_KEY",
    "SafetensorsWriter",
    "check_disk_space",
    "check_name",
    "final_path",
    "find_disk",
    "header_bytes",
    "inspect_file",
    "keep_apart",
    "leftover_bytes",
    "loading_note",
    "lock_file",
    "provenance",
    "remove_leftovers",
    "verify_file",
]
