"""Quantizers, linear layers and rounding kernels behind one dispatch.

``triton`` and ``reference`` (plain torch) implement the same functions. ``operators`` registers them as torch operators
and defines the public functions, ``prepared`` keeps a linear layer's implementation and launches by shape, ``backends``
selects the implementation, ``tuning`` measures and caches the fastest one, ``tensor_cores`` wraps torch's own 8-bit matrix
products.
"""

from .backends import BACKENDS, OPERATIONS, backend, refusals, using
from .operators import (
    dequantize_weight,
    expand_w4a8_weight,
    fp8_block_linear,
    fp8_row_linear,
    int8_block_linear,
    int8_row_linear,
    quantize_fp8_block,
    quantize_fp8_block_weight,
    quantize_fp8_row,
    quantize_fp8_row_weight,
    quantize_int8_block,
    quantize_int8_block_weight,
    quantize_int8_row,
    quantize_int8_row_weight,
    round_block,
    round_block_beam,
    scale_errors,
    scaled_linear,
    search_level_scales,
    w4a8_linear,
)
from .prepared import fp8_static_linear, has_static_fp8

__all__ = [
    "BACKENDS",
    "OPERATIONS",
    "backend",
    "dequantize_weight",
    "expand_w4a8_weight",
    "fp8_block_linear",
    "fp8_row_linear",
    "fp8_static_linear",
    "has_static_fp8",
    "int8_block_linear",
    "int8_row_linear",
    "quantize_fp8_block",
    "quantize_fp8_block_weight",
    "quantize_fp8_row",
    "quantize_fp8_row_weight",
    "quantize_int8_block",
    "quantize_int8_block_weight",
    "quantize_int8_row",
    "quantize_int8_row_weight",
    "refusals",
    "round_block",
    "round_block_beam",
    "scale_errors",
    "scaled_linear",
    "search_level_scales",
    "using",
    "w4a8_linear",
]
