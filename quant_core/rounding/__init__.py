"""Which code each weight gets, and under which scale."""

from .methods import ROUNDINGS, check_rounding
from .nearest import quantize_nearest
from .scales import amax_scale, search_scale

__all__ = ["ROUNDINGS", "check_rounding", "quantize_nearest", "amax_scale", "search_scale"]
