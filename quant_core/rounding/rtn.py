"""Round to nearest (RTN): the baseline, and optimal for white activations."""

import torch

from ..cancellation import CancelCheck
from ..errors import NonFiniteWeightError
from ..formats import SolveSpace
from .slabs import error_slabs, row_slabs

__all__ = ["amax_scale", "round_to_nearest", "weight_error"]


def amax_scale(
    weight: torch.Tensor, space: SolveSpace, check: CancelCheck | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The scales that map each group's largest magnitude to the largest element, and their parent level.

    Args:
        weight: (out, in), any float dtype, in the stored basis.

    Returns:
        effective scales, float32 (*counts), and the parent (float32) or None, see :class:`~..formats.scales.ScaleFormat`.

    Raises:
        NonFiniteWeightError: the weight contains NaN or Inf.
    """
    groups = space.groups
    amax = torch.empty(weight.shape[0], groups.counts[1], dtype=torch.float32, device=weight.device)
    for start, stop, rows in row_slabs(weight, check):
        amax[start:stop] = groups.row_amax(rows)
    amax = groups.join_rows(amax, torch.amax)
    if not torch.isfinite(amax).all():
        raise NonFiniteWeightError("The weight contains NaN or Inf, which no scale can represent.")
    return space.scales.from_amax(amax, space.elements.max)


def round_to_nearest(
    weight: torch.Tensor, scale: torch.Tensor, space: SolveSpace, check: CancelCheck | None = None
) -> tuple[torch.Tensor, float]:
    """q = round(w/s), ties to even, for a whole weight.

    Args:
        weight: (out, in), any float dtype.
        scale: effective scales, float32 (*counts).

    Returns:
        quantized values (out, in) in the element format's dtype, and ‖Ŵ − W‖/‖W‖ (0 for an all-zero weight).
    """
    qdata = torch.empty(weight.shape, dtype=space.elements.dtype, device=weight.device)
    error = torch.empty(weight.shape[0], 1, dtype=torch.float64, device=weight.device)
    total = torch.empty_like(error)
    for start, stop, rows in row_slabs(weight, check):
        qdata[start:stop] = space.encode(rows, scale, start, stop)
        error[start:stop] = _row_norms(space.decode(qdata[start:stop], scale, start, stop).sub_(rows))
        total[start:stop] = _row_norms(rows)
    return qdata, _ratio(error, total)


def weight_error(
    weight: torch.Tensor, qdata: torch.Tensor, scale: torch.Tensor, space: SolveSpace, check: CancelCheck | None = None
) -> float:
    """‖Ŵ − W‖/‖W‖ of any quantized values; 0 for an all-zero weight."""
    error = torch.empty(weight.shape[0], 1, dtype=torch.float64, device=weight.device)
    total = torch.empty_like(error)
    for start, stop, rows in row_slabs(weight, check):
        total[start:stop] = _row_norms(rows)
    for start, stop, errors in error_slabs(weight, qdata, scale, space, check):
        error[start:stop] = _row_norms(errors)
    return _ratio(error, total)


def _row_norms(rows: torch.Tensor) -> torch.Tensor:
    """Euclidean norm of each row as float64 (rows, 1); per row, so that no sum depends on the number of threads.

    Rows are divided by their largest magnitude first, so that no square over- or underflows.
    """
    largest = rows.abs().amax(dim=1, keepdim=True)
    scaled = rows / largest.clamp_min(torch.finfo(torch.float32).tiny)
    return torch.linalg.vector_norm(scaled, dim=1, keepdim=True).double() * largest.double()


def _ratio(error: torch.Tensor, total: torch.Tensor) -> float:
    norm = torch.linalg.vector_norm(total)
    return float(torch.linalg.vector_norm(error) / norm) if norm else 0.0
