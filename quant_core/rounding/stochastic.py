"""Stochastic rounding: each weight to one of its two neighbouring codes, at random, right on average."""

import torch

from ..cancellation import CancelCheck
from ..formats import Grid, Tiles
from .slabs import row_slabs

__all__ = ["round_stochastic"]


def round_stochastic(
    weight: torch.Tensor,
    scale: torch.Tensor,
    grid: Grid,
    tiles: Tiles,
    *,
    seed: int = 0,
    check: CancelCheck | None = None,
) -> torch.Tensor:
    """Codes (out, in) with expectation w/s: the upper neighbour with probability (w/s − low)/(high − low).

    Unbiased where nothing clamps, as under the amax scale. ComfyUI rounds weights so after it has patched a LoRA into
    them: errors of many small changes average out instead of adding up. Same seed and device class, same codes.
    """
    generator = torch.Generator(weight.device).manual_seed(seed)
    codes = torch.empty(weight.shape, dtype=grid.dtype, device=weight.device)
    for start, stop, rows in row_slabs(weight, check):
        scaled = rows / tiles.spread(scale, start, stop)
        low, high = grid.neighbours(scaled)
        drawn = torch.rand(rows.shape, generator=generator, device=weight.device)
        codes[start:stop] = torch.where(drawn * (high - low) < scaled - low, high, low).to(grid.dtype)
    return codes
