"""Quantized files: streaming writer, header metadata, verification, inspection."""

from .inspect import inspect_file
from .layout import header_bytes
from .metadata import PROVENANCE_KEY, QUANTIZATION_KEY, layer_configs, loading_note, provenance, quantization_metadata
from .partial import remove_leftovers
from .publish import final_path, keep_apart
from .verify import verify_file
from .writer import SafetensorsWriter

__all__ = [
    "PROVENANCE_KEY",
    "QUANTIZATION_KEY",
    "SafetensorsWriter",
    "final_path",
    "header_bytes",
    "inspect_file",
    "keep_apart",
    "layer_configs",
    "loading_note",
    "provenance",
    "quantization_metadata",
    "remove_leftovers",
    "verify_file",
]
