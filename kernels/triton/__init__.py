"""Triton implementations of the functions of :mod:`..reference`."""

from .beam import MAX_BEAM_WIDTH, round_block_beam
from .grouped_levels import expand_weight, prepare_w4a8_linear
from .linear import prepare_autotuned_linear, prepare_linear
from .quantize import dequantize_weight, prepare_quantizer, prepare_static_quantizer, quantize_weight
from .rounding import MAX_COLUMNS, round_block, scale_errors, search_level_scales

__all__ = [
    "MAX_BEAM_WIDTH",
    "MAX_COLUMNS",
    "dequantize_weight",
    "expand_weight",
    "prepare_autotuned_linear",
    "prepare_linear",
    "prepare_quantizer",
    "prepare_static_quantizer",
    "prepare_w4a8_linear",
    "quantize_weight",
    "round_block",
    "round_block_beam",
    "scale_errors",
    "search_level_scales",
]
