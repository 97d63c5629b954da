"""Scales: amax is a start, not the answer.

For a floating grid the scale matters only modulo a power of two, so one octave above amax is
searched; for an integer grid the clip ratio. Both minimise tr(E H Eᵀ) with H = I, the Gram of
white inputs, which is what is known of a layer's inputs without calibration.
"""

import torch

from ..errors import NonFiniteWeightError
from ..events import CancelCheck
from ..formats import Granularity, Grid
from .nearest import round_rows
from .slabs import row_slabs

__all__ = ["amax_scale", "search_scale"]

_OCTAVE = tuple(2.0 ** (step / 16) for step in range(16))
_CLIP = tuple(1.0 - step / 64 for step in range(24))
# A whole-tensor scale is chosen on at most this many weights, drawn as whole rows.
_SAMPLE = 1 << 21
_SMALLEST = torch.finfo(torch.float32).tiny


def amax_scale(weight: torch.Tensor, grid: Grid, share: Granularity, check: CancelCheck | None = None) -> torch.Tensor:
    """The scale that maps the largest magnitude onto the grid's end; 1 where all weights are zero.

    ``weight``: (out, in). Raises :class:`NonFiniteWeightError` when it holds NaN or Inf.
    """
    amax = torch.empty(weight.shape[0], 1, dtype=torch.float32, device=weight.device)
    for start, stop, rows in row_slabs(weight, check):
        amax[start:stop] = rows.abs().amax(dim=1, keepdim=True)
    if share.whole:
        amax = amax.amax()
    if not torch.isfinite(amax).all():
        raise NonFiniteWeightError("The weight holds NaN or Inf, which no scale can represent.")
    # A GPU multiplies by the reciprocal of a plain number, which rounds differently; a tensor it divides by.
    scale = amax / torch.full_like(amax, grid.max)
    return torch.where(amax > 0, scale.clamp_min(_SMALLEST), torch.ones_like(amax))


def _sampled_rows(weight: torch.Tensor, seed: int) -> torch.Tensor:
    rows = max(1, _SAMPLE // weight.shape[1])
    if rows >= weight.shape[0]:
        return weight
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(weight.shape[0], generator=generator)[:rows].sort().values
    return weight[chosen.to(weight.device)]


def _best_ratio(
    weight: torch.Tensor,
    start: torch.Tensor,
    ratios: torch.Tensor,
    grid: Grid,
    share: Granularity,
    check: CancelCheck | None,
) -> torch.Tensor:
    """The ratio, of the shape of ``start``, whose scale loses least after hard rounding; the first of equals."""
    errors = torch.empty(len(ratios), weight.shape[0], 1, dtype=torch.float64, device=weight.device)
    for first, last, rows in row_slabs(weight, check):
        slab_start = share.slab(start, first, last)
        for candidate, ratio in enumerate(ratios):
            if check:
                check()
            errors[candidate, first:last] = round_rows(rows, slab_start * ratio, grid)[1]
    total = torch.linalg.vector_norm(errors, dim=(1, 2)) if share.whole else errors
    return ratios[total.argmin(dim=0)]


def search_scale(
    weight: torch.Tensor,
    start: torch.Tensor,
    grid: Grid,
    share: Granularity,
    *,
    seed: int = 0,
    check: CancelCheck | None = None,
) -> torch.Tensor:
    """The best of a few dozen multiples of the amax scale ``start``; never worse than ``start`` itself.

    ``weight``: (out, in). A scale that all rows of a large weight share is chosen on a seeded sample of rows,
    then held against ``start`` on the whole weight.
    """
    ratios = torch.tensor(_OCTAVE if grid.floating else _CLIP, device=weight.device)
    judged = _sampled_rows(weight, seed) if share.whole else weight
    ratio = _best_ratio(judged, start, ratios, grid, share, check)
    if judged is not weight:
        ratio = _best_ratio(weight, start, torch.stack([ratios[0], ratio]), grid, share, check)
    return (start * ratio).clamp_min(_SMALLEST)
