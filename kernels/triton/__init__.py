"""Triton implementations of the functions of :mod:`..reference`."""

from .linear import autotuned_linear, scaled_linear
from .quantize import dequantize_weight, quantize_inputs, quantize_weight
from .rounding import MAX_COLUMNS, round_block, scale_errors

__all__ = [
    "MAX_COLUMNS",
    "autotuned_linear",
    "dequantize_weight",
    "quantize_inputs",
    "quantize_weight",
    "round_block",
    "scale_errors",
    "scaled_linear",
]
