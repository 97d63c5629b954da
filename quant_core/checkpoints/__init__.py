"""Tensors in and out of files: streaming reader and writer, metadata, verification, inspection."""

from .inspect import inspect_file
from .metadata import PROVENANCE_KEY, QUANTIZATION_KEY, layer_configs, loading_note, provenance, quantization_metadata
from .reader import SafetensorsFile
from .source import SampledSource, Source, TensorInfo, TensorSource
from .sources import open_safetensors, open_source
from .verify import verify_file
from .writer import SafetensorsWriter, final_path, header_bytes, keep_apart, remove_leftovers

__all__ = [
    "inspect_file",
    "PROVENANCE_KEY",
    "QUANTIZATION_KEY",
    "layer_configs",
    "loading_note",
    "open_safetensors",
    "open_source",
    "provenance",
    "quantization_metadata",
    "SafetensorsFile",
    "SampledSource",
    "Source",
    "TensorInfo",
    "TensorSource",
    "verify_file",
    "SafetensorsWriter",
    "final_path",
    "header_bytes",
    "keep_apart",
    "remove_leftovers",
]
