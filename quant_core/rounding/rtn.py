"""Rounding to the nearest code: the baseline, and the best there is for white inputs."""

import torch

from ..cancellation import CancelCheck
from ..formats import Grid, Tiles
from .slabs import error_slabs, row_slabs

__all__ = ["quantize_nearest", "weight_error"]


def _row_norms(rows: torch.Tensor) -> torch.Tensor:
    """Euclidean norm of each row as float64 (rows, 1); per row, so that no sum depends on the number of threads.

    Rows are divided by their largest magnitude first: no square over- or underflows.
    """
    largest = rows.abs().amax(dim=1, keepdim=True)
    scaled = rows / largest.clamp_min(torch.finfo(torch.float32).tiny)
    return torch.linalg.vector_norm(scaled, dim=1, keepdim=True).double() * largest.double()


def _ratio(lost: torch.Tensor, total: torch.Tensor) -> float:
    norm = torch.linalg.vector_norm(total)
    return float(torch.linalg.vector_norm(lost) / norm) if norm else 0.0


def weight_error(
    weight: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, tiles: Tiles, check: CancelCheck | None = None
) -> float:
    """‖s·q − W‖/‖W‖ of any codes; 0 when W is all zero."""
    lost = torch.empty(weight.shape[0], 1, dtype=torch.float64, device=weight.device)
    total = torch.empty_like(lost)
    for start, stop, rows in row_slabs(weight, check):
        total[start:stop] = _row_norms(rows)
    for start, stop, errors in error_slabs(weight, codes, scale, tiles, check):
        lost[start:stop] = _row_norms(errors)
    return _ratio(lost, total)


def quantize_nearest(
    weight: torch.Tensor, scale: torch.Tensor, grid: Grid, tiles: Tiles, check: CancelCheck | None = None
) -> tuple[torch.Tensor, float]:
    """q = round(w/s) for a whole weight.

    Args:
        weight: (out, in), any float dtype.
        scale: float32, one per tile.

    Returns:
        codes (out, in) of ``grid.dtype``, and ‖s·q − W‖/‖W‖ (0 when W is all zero).
    """
    codes = torch.empty(weight.shape, dtype=grid.dtype, device=weight.device)
    lost = torch.empty(weight.shape[0], 1, dtype=torch.float64, device=weight.device)
    total = torch.empty_like(lost)
    for start, stop, rows in row_slabs(weight, check):
        spread = tiles.spread(scale, start, stop)
        codes[start:stop] = grid.encode(rows / spread)
        lost[start:stop] = _row_norms(codes[start:stop].float().mul_(spread).sub_(rows))
        total[start:stop] = _row_norms(rows)
    return codes, _ratio(lost, total)
