"""Every format and granularity, shapes that they hold, and the scales with which a weight is rounded to nearest."""

import torch

from learned_rounding.quant_core import FORMATS
from learned_rounding.quant_core.formats import QuantizedWeight, make_codec
from learned_rounding.quant_core.rounding.scaling import Scaling, start_scaling

TARGETS = [(name, granularity) for name, entry in FORMATS.items() for granularity in entry.granularities]
COLUMNS = {"asym_w4a8_int8": 16, "convrot_w4a4": 64}  # format → what the input channels are a multiple of


def held_shape(format: str, shape: tuple[int, int]) -> tuple[int, int]:
    """The smallest shape that the format holds with at least as many columns."""
    multiple = COLUMNS.get(format, 1)
    return shape[0], -(-shape[1] // multiple) * multiple


def start(weight: torch.Tensor, format: str, granularity: str) -> Scaling:
    """The start of a weight in the stored basis, in blocks of 16 where there are blocks."""
    codec = make_codec(format, granularity, block_size=16 if granularity == "block" else None)
    return start_scaling(weight, codec.solve_space((weight.shape[0], weight.shape[1])))


def stored(quantized: QuantizedWeight, weight: torch.Tensor) -> tuple[torch.Tensor, Scaling]:
    """The weight in the basis in which it was rounded, and the scales that it was rounded with."""
    codec, solution = quantized.codec, quantized.solution
    space = codec.solve_space((weight.shape[0], weight.shape[1]))
    space = space if solution.levels is None else space.with_levels(solution.levels)
    return codec.basis.apply_weight(weight) if codec.basis else weight, Scaling(solution.scale, solution.parent, space)
