"""Every kernel in plain torch: what the Triton kernels are checked against, and what runs where there is no Triton."""

from .linear import scaled_linear
from .quantize import LARGEST, SMALLEST_AMAX, dequantize_weight, quantize_inputs, quantize_weight
from .rounding import grid_step, round_block, round_to_grid, scale_errors

__all__ = [
    "LARGEST",
    "SMALLEST_AMAX",
    "dequantize_weight",
    "grid_step",
    "quantize_inputs",
    "quantize_weight",
    "round_block",
    "round_to_grid",
    "scale_errors",
    "scaled_linear",
]
