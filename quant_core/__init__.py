"""The library: which layers, which codes, which file. Never imports ComfyUI."""

from .errors import QuantizationError
from .formats import FORMATS, QuantizedWeight
from .quantize_layer import quantize_weight
from .recipes import PRESETS, Recipe
from .run.quantize import quantize_file, quantize_tensors
from .run.report import Report

__all__ = [
    "FORMATS",
    "PRESETS",
    "QuantizationError",
    "QuantizedWeight",
    "Recipe",
    "Report",
    "quantize_file",
    "quantize_tensors",
    "quantize_weight",
]
