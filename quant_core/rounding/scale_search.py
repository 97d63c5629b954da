"""Scales: amax is a start, not the answer.

For a floating grid the scale matters only modulo a power of two, so one octave above amax is
searched; for an integer grid the clip ratio. Both minimise tr(E·D·Eᵀ) with D the diagonal of what
the rounding minimises: that of the inputs' Gram, or I where nothing is known of them.
"""

import torch

from ... import kernels
from ..cancellation import CancelCheck
from ..errors import NonFiniteWeightError
from ..formats import Grid, Tiles
from .slabs import row_slabs

__all__ = ["amax_scale", "search_scale"]

_OCTAVE = tuple(2.0 ** (step / 16) for step in range(16))
_CLIP = tuple(1.0 - step / 64 for step in range(24))
# A whole-tensor scale is chosen on at most this many weights, drawn as whole rows.
_SAMPLE = 1 << 21
_SMALLEST = torch.finfo(torch.float32).tiny


def amax_scale(weight: torch.Tensor, grid: Grid, tiles: Tiles, check: CancelCheck | None = None) -> torch.Tensor:
    """The scale of each tile that maps its largest magnitude onto the grid's end; 1 where all weights are zero.

    ``weight``: (out, in). Raises :class:`NonFiniteWeightError` when it holds NaN or Inf.
    """
    amax = torch.empty(weight.shape[0], tiles.counts[1], dtype=torch.float32, device=weight.device)
    for start, stop, rows in row_slabs(weight, check):
        amax[start:stop] = tiles.row_amax(rows)
    amax = tiles.join_rows(amax, torch.amax)
    if not torch.isfinite(amax).all():
        raise NonFiniteWeightError("The weight holds NaN or Inf, which no scale can represent.")
    # A GPU multiplies by the reciprocal of a plain number, which rounds differently; a tensor it divides by.
    scale = amax / torch.full_like(amax, grid.max)
    return torch.where(amax > 0, scale.clamp_min(_SMALLEST), torch.ones_like(amax))


def _sample(weight: torch.Tensor, seed: int) -> torch.Tensor | None:
    """Indices of rows to judge a shared scale on, or None for all."""
    rows = max(1, _SAMPLE // weight.shape[1])
    if rows >= weight.shape[0]:
        return None
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(weight.shape[0], generator=generator)[:rows].sort().values.to(weight.device)


def _tile_errors(
    weight: torch.Tensor,
    ratios: torch.Tensor,
    start: torch.Tensor,
    column_weight: torch.Tensor | None,
    row_weight: torch.Tensor | None,
    grid: Grid,
    tiles: Tiles,
    check: CancelCheck | None,
) -> torch.Tensor:
    """Squared error of each tile under each candidate, float64 (candidates, *counts), in squares of the weights' unit."""
    group = tiles.group if row_weight is None else 1
    shape = (len(ratios), -(-weight.shape[0] // group), tiles.counts[1])
    errors = torch.empty(shape, dtype=torch.float64, device=weight.device)
    # A GPU judges all candidates while a weight is in registers; on a CPU one at a time can be cancelled sooner.
    passes = [slice(None)] if weight.is_cuda else [slice(i, i + 1) for i in range(len(ratios))]
    for first, last, rows in row_slabs(weight, check, tiles.group):
        scale = start if tiles.counts[0] == 1 else start[first // tiles.rows : -(-last // tiles.rows)]
        groups = slice(first // group, -(-last // group))
        for part in passes:
            if check:
                check()
            errors[part, groups] = kernels.scale_errors(
                rows, scale, ratios[part], column_weight, tiles.rows, tiles.columns, group, grid.arithmetic
            ).double()
    if row_weight is not None:
        errors *= row_weight.double()[:, None]
    errors = tiles.join_rows(errors, torch.sum, group)
    return errors.mul_((start.double() * ratios.double().view(-1, 1, 1)).square_())


def search_scale(
    weight: torch.Tensor,
    start: torch.Tensor,
    grid: Grid,
    tiles: Tiles,
    *,
    column_weight: torch.Tensor | None = None,
    row_weight: torch.Tensor | None = None,
    seed: int = 0,
    check: CancelCheck | None = None,
) -> tuple[torch.Tensor, float]:
    """The best of a few dozen multiples of the amax scale ``start``; never worse than ``start`` itself.

    ``weight``: (out, in); ``column_weight`` and ``row_weight``: float32 (in,) and (out,), not negative, or None for
    ones. A scale that all rows of a large weight share is chosen on a seeded sample of rows, then held against
    ``start`` on the whole weight.

    Returns:
        the scale, and √(Σ error²) relative to that of ``start`` (1 when nothing is lost by either).
    """
    ratios = torch.tensor(_OCTAVE if grid.floating else _CLIP, device=weight.device)
    if column_weight is not None:
        mean = column_weight.mean()
        column_weight = column_weight / mean if mean > 0 else None
    arguments = (grid, tiles, check)
    sample = _sample(weight, seed) if tiles.counts == (1, 1) else None
    if sample is not None:
        rows = None if row_weight is None else row_weight[sample]
        best = _tile_errors(weight[sample], ratios, start, column_weight, rows, *arguments).argmin(dim=0)
        ratios = torch.stack([ratios[0], ratios[best].view(())])
    errors = _tile_errors(weight, ratios, start, column_weight, row_weight, *arguments)
    best = errors.argmin(dim=0)
    lost, before = errors.gather(0, best[None]).sum(), errors[0].sum()
    return (start * ratios[best]).clamp_min(_SMALLEST), float((lost / before).sqrt()) if before > 0 else 1.0
