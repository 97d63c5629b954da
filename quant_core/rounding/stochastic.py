"""Stochastic rounding: each weight to one of its two neighbours at random, unbiased."""

import torch

from ..cancellation import CancelCheck
from ..formats import SolveSpace
from .slabs import row_slabs

__all__ = ["round_stochastic"]


def round_stochastic(
    weight: torch.Tensor, scale: torch.Tensor, space: SolveSpace, *, seed: int = 0, check: CancelCheck | None = None
) -> torch.Tensor:
    """Quantized values (out, in) with expectation w/s: the upper neighbour with probability (w/s − low)/(high − low).

    Unbiased where nothing clamps, as under the amax scale. ComfyUI rounds so after it has merged a LoRA into weights:
    errors of many small changes average out. Same seed and class of device, same quantized values.
    """
    generator = torch.Generator(weight.device).manual_seed(seed)
    qdata = torch.empty(weight.shape, dtype=space.elements.dtype, device=weight.device)
    for start, stop, rows in row_slabs(weight, check):
        scaled = rows / space.divisor(scale, start, stop)
        low, high = space.neighbours(scaled, start, stop)
        random = torch.rand(rows.shape, generator=generator, device=weight.device)
        qdata[start:stop] = torch.where(random * (high - low) < scaled - low, high, low).to(space.elements.dtype)
    return qdata
