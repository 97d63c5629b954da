"""Kernels behind one dispatch: ``triton/`` and ``reference/`` (plain torch) hold the same names and signatures.

``operators`` are the public 8-bit quantizers and linear layers, ``backends`` says which implementation runs, ``tuning``
remembers what was measured, ``tensor_cores`` holds torch's own 8-bit products.
"""

from .backends import BACKENDS, OPERATIONS, backend, implementation, refusals, using
from .operators import (
    dequantize_weight,
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
    scaled_linear,
)

__all__ = [
    "BACKENDS",
    "OPERATIONS",
    "backend",
    "dequantize_weight",
    "fp8_block_linear",
    "fp8_row_linear",
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
    "scale_errors",
    "scaled_linear",
    "using",
]


def round_block(weight, shift, before, coupling, scale, tile_rows, grid):
    """Round a block of columns one after the other, feeding each column's error to the others; see :mod:`.reference`."""
    return implementation("round_block", weight, shift, before, coupling)(
        weight, shift, before, coupling, scale, tile_rows, grid
    )


def scale_errors(weight, scale, ratios, column_weight, tile_rows, tile_columns, group, grid):
    """Squared rounding errors under many candidate scales in one pass; see :mod:`.reference`."""
    return implementation("scale_errors", weight)(
        weight, scale, ratios, column_weight, tile_rows, tile_columns, group, grid
    )
