"""Quantized files: streaming writer, header metadata, verification, inspection."""

from .inspect import inspect_file
from .metadata import PROVENANCE_KEY, QUANTIZATION_KEY, layer_configs, loading_note, provenance, quantization_metadata
from .verify import verify_file
from .writer import SafetensorsWriter, final_path, header_bytes, keep_apart, remove_leftovers

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
