"""Rounding to the nearest code: the baseline, and the best there is for white inputs."""

import torch

from ..events import CancelCheck
from ..formats import Granularity, Grid
from .slabs import row_slabs

__all__ = ["quantize_nearest", "round_rows"]


def round_rows(rows: torch.Tensor, scale: torch.Tensor, grid: Grid) -> tuple[torch.Tensor, torch.Tensor]:
    """q = round(w/s) for whole rows (float32), and ‖s·q − w‖ per row as float64 (rows, 1).

    The norm is per row so that no sum depends on the number of threads, and taken before scaling so that no square
    over- or underflows.
    """
    scaled = rows / scale
    codes = grid.encode(scaled)
    error = torch.linalg.vector_norm(codes.float().sub_(scaled), dim=1, keepdim=True)
    return codes, error.double() * scale.double()


def quantize_nearest(
    weight: torch.Tensor, scale: torch.Tensor, grid: Grid, share: Granularity, check: CancelCheck | None = None
) -> tuple[torch.Tensor, float]:
    """Round a whole weight.

    Args:
        weight: (out, in), any float dtype.
        scale: float32, of the granularity's shape.

    Returns:
        codes (out, in) of ``grid.dtype``, and ‖s·q − W‖/‖W‖ (0 when W is all zero).
    """
    codes = torch.empty(weight.shape, dtype=grid.dtype, device=weight.device)
    lost = torch.empty(weight.shape[0], 1, dtype=torch.float64, device=weight.device)
    total = torch.empty_like(lost)
    for start, stop, rows in row_slabs(weight, check):
        codes[start:stop], lost[start:stop] = round_rows(rows, share.slab(scale, start, stop), grid)
        total[start:stop] = torch.linalg.vector_norm(rows, dim=1, keepdim=True, dtype=torch.float64)
    norm = torch.linalg.vector_norm(total)
    return codes, float(torch.linalg.vector_norm(lost) / norm) if norm else 0.0
