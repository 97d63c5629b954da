"""Rounding to the nearest code: the baseline, and the best there is for white inputs."""

import torch

from ..events import CancelCheck
from ..formats import Granularity, Grid
from .slabs import row_slabs, squared_norm

__all__ = ["quantize_nearest"]


def quantize_nearest(
    weight: torch.Tensor, scale: torch.Tensor, grid: Grid, share: Granularity, check: CancelCheck | None = None
) -> tuple[torch.Tensor, float]:
    """q = round(W/s).

    Args:
        weight: (out, in), any float dtype.
        scale: float32, of the granularity's shape.

    Returns:
        codes (out, in) of ``grid.dtype``, and ‖s·q − W‖/‖W‖ (0 when W is all zero).
    """
    codes = torch.empty(weight.shape, dtype=grid.dtype, device=weight.device)
    lost = torch.zeros((), dtype=torch.float64, device=weight.device)
    total = torch.zeros_like(lost)
    for start, stop, rows in row_slabs(weight, check):
        slab_scale = share.slab(scale, start, stop)
        codes[start:stop] = slab_codes = grid.encode(rows / slab_scale)
        lost += squared_norm(slab_codes.float().mul_(slab_scale).sub_(rows))
        total += squared_norm(rows)
    return codes, float((lost / total.clamp_min(torch.finfo(torch.float64).tiny)).sqrt())
