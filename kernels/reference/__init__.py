"""Every kernel in plain torch: the oracle of the Triton kernels, and the implementation for devices without Triton."""

from .beam import round_block_beam
from .grouped_levels import expand_weight, prepare_w4a8_linear, scale_levels
from .linear import prepare_linear
from .quantize import LARGEST, SMALLEST_AMAX, dequantize_weight, prepare_quantizer, quantize_inputs, quantize_weight
from .rounding import (
    element_step,
    enclosing_levels,
    round_block,
    round_to_element,
    round_to_levels,
    scale_errors,
    search_level_scales,
)

__all__ = [
    "LARGEST",
    "SMALLEST_AMAX",
    "dequantize_weight",
    "element_step",
    "enclosing_levels",
    "expand_weight",
    "prepare_linear",
    "prepare_quantizer",
    "prepare_w4a8_linear",
    "quantize_inputs",
    "quantize_weight",
    "round_block",
    "round_block_beam",
    "round_to_element",
    "round_to_levels",
    "scale_errors",
    "scale_levels",
    "search_level_scales",
]
