"""Scale search: among multiples of the amax scale, the one of least weighted error for each group.

For floating elements under float32 scales only the position within an octave matters, so one octave above amax is
searched; for integer elements the clip ratio. Minimised is tr(E·D·Eᵀ), D the diagonal of the Hessian, or I without one.
"""

import torch

from ... import kernels
from ..cancellation import CancelCheck
from ..formats import SolveSpace
from .slabs import row_slabs

__all__ = ["search_scale"]

# A scale of the whole tensor is chosen on at most this many weights, drawn as whole rows.
_SAMPLE = 1 << 21


def search_scale(
    weight: torch.Tensor,
    start: torch.Tensor,
    parent: torch.Tensor | None,
    space: SolveSpace,
    *,
    column_weight: torch.Tensor | None = None,
    row_weight: torch.Tensor | None = None,
    seed: int = 0,
    check: CancelCheck | None = None,
) -> tuple[torch.Tensor, float]:
    """The best of a few representable multiples of the amax scale ``start``, for each group; never worse than ``start``.

    Args:
        weight: (out, in), any float dtype.
        start, parent: from :func:`~.rtn.amax_scale`.
        column_weight, row_weight: float32 (in,) and (out,), not negative; None for ones.
        seed: of the rows that a scale of a large whole tensor is chosen on; it is then compared with ``start`` on all rows.

    Returns:
        effective scales, float32 (*counts), and √(Σ error²) relative to that of ``start`` (1 where neither has an error).
    """
    ratios = torch.tensor(space.scales.ratios(space.elements.floating), device=weight.device)
    if column_weight is not None:
        mean = column_weight.mean()
        column_weight = column_weight / mean if mean > 0 else None
    sample = _sample_rows(weight, seed) if space.groups.counts == (1, 1) else None
    if sample is not None:
        rows = None if row_weight is None else row_weight[sample]
        passes = _passes(weight, start, parent, ratios, space)
        best = _group_errors(weight[sample], passes, column_weight, rows, space, check).argmin(dim=0)
        ratios = torch.stack([ratios[0], ratios[best].view(())])
    passes = _passes(weight, start, parent, ratios, space)
    errors = _group_errors(weight, passes, column_weight, row_weight, space, check)
    best = errors.argmin(dim=0)
    error, before = errors.gather(0, best[None]).sum(), errors[0].sum()
    scale = space.scales.snap(start * ratios[best], parent)
    return scale, float((error / before).sqrt()) if before > 0 else 1.0


_Pass = tuple[torch.Tensor, torch.Tensor]  # scale float32 (*counts), and the ratios float32 (n,) that multiply it


def _passes(
    weight: torch.Tensor, start: torch.Tensor, parent: torch.Tensor | None, ratios: torch.Tensor, space: SolveSpace
) -> list[_Pass]:
    """How the candidates are compared: passes over the weight, each with a scale and some of the ratios."""
    if space.scales.continuous:
        # A GPU compares all candidates while a weight is in registers; on a CPU one at a time can be cancelled sooner.
        return [(start, ratios)] if weight.is_cuda else [(start, ratio) for ratio in ratios.split(1)]
    one = ratios.new_ones(1)
    snapped = (space.scales.snap(start * ratio, parent) for ratio in ratios)
    # In a group with the scale 0 all weights are so small that they round to 0 under the scale 1 as well.
    return [(torch.where(scale > 0, scale, torch.ones_like(scale)), one) for scale in snapped]


def _group_errors(
    weight: torch.Tensor,
    passes: list[_Pass],
    column_weight: torch.Tensor | None,
    row_weight: torch.Tensor | None,
    space: SolveSpace,
    check: CancelCheck | None,
) -> torch.Tensor:
    """Squared error of each group under each candidate, float64 (candidates, *counts), in the weights' unit squared."""
    groups = space.groups
    summed = groups.summed_rows if row_weight is None else 1
    counts = [len(ratios) for _, ratios in passes]
    shape = (sum(counts), -(-weight.shape[0] // summed), groups.counts[1])
    errors = torch.empty(shape, dtype=torch.float64, device=weight.device)
    by_pass = errors.split(counts)
    for first, last, rows in row_slabs(weight, check, groups.summed_rows):
        scale_rows = slice(None) if groups.counts[0] == 1 else slice(first // groups.rows, -(-last // groups.rows))
        sums = slice(first // summed, -(-last // summed))
        for (scale, ratios), own in zip(passes, by_pass, strict=True):
            if check:
                check()
            own[:, sums] = kernels.scale_errors(
                rows,
                scale[scale_rows],
                ratios,
                column_weight,
                groups.rows,
                groups.columns,
                summed,
                space.elements.arithmetic,
            ).double()
    if row_weight is not None:
        errors *= row_weight.double()[:, None]
    errors = groups.join_rows(errors, torch.sum, summed)
    for (scale, ratios), own in zip(passes, errors.split(counts), strict=True):
        own.mul_((scale.double() * ratios.double().view(-1, 1, 1)).square_())
    return errors


def _sample_rows(weight: torch.Tensor, seed: int) -> torch.Tensor | None:
    """Indices of rows to choose a scale of the whole tensor on, or None for all."""
    rows = max(1, _SAMPLE // weight.shape[1])
    if rows >= weight.shape[0]:
        return None
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(weight.shape[0], generator=generator)[:rows].sort().values.to(weight.device)
