"""Levels of a weight: the codes, the scale of each row, and the scale of each group of its quantized values.

The start is that of comfy-kitchen's ``quantize_w4a8_int8_weight``, so that round to nearest gives the same bytes: group
scales by alternating least squares from the largest magnitudes, and E4M3 group scales relative to a row scale that maps the
largest dequantized weight of a row to 127. The search tries the E4M3 numbers around each of them under the diagonal of the
Hessian.
"""

import math

import torch

from ... import kernels
from ..cancellation import CancelCheck
from ..errors import NonFiniteWeightError
from ..formats import INT8, GroupLevels, SolveSpace
from ..formats.scales import divide
from .slabs import row_slabs

__all__ = ["fit_codes", "search_levels", "start_levels"]

_PASSES = 2  # of alternating least squares
_SMALLEST = 1e-8  # scale
_STEPS = 4  # E4M3 numbers above and below the start that are tried
_HEAVY_TAILS = -0.1  # excess kurtosis from which on codes are fitted; that of Gaussian groups of 16 is −0.5
_SAMPLED_ROWS = 1 << 22  # weights, as whole rows, that the codes are chosen on
_SAMPLED = 1 << 19  # weights of these rows whose kurtosis is measured
_FITTED = 300_000  # weights that codes are fitted to
_FIT_PASSES = 25


def start_levels(
    weight: torch.Tensor, space: SolveSpace, check: CancelCheck | None = None
) -> tuple[GroupLevels, torch.Tensor]:
    """Levels and row scales, float32 (out, 1), as round to nearest takes them.

    Args:
        weight: (out, in), any float dtype, in the stored basis.
        space: with levels, whose codes are a codebook (within ±1) or integers.

    Raises:
        NonFiniteWeightError: the weight contains NaN or Inf.
    """
    levels = space.levels
    assert levels is not None
    codes = levels.codes.to(weight.device)
    integers = bool((codes == codes.round()).all())
    if not integers:
        codes = _choose_codes(weight, codes, levels.columns)
    scale = torch.empty(weight.shape[0], 1, device=weight.device)
    relative = torch.empty(weight.shape[0], weight.shape[1] // levels.columns, device=weight.device)
    for start, stop, rows in row_slabs(weight, check):
        grouped = rows.unflatten(1, (-1, levels.columns))
        amax = grouped.abs().amax(dim=-1, keepdim=True)
        if not torch.isfinite(amax).all():
            raise NonFiniteWeightError("The weight contains NaN or Inf, which no scale can represent.")
        largest = divide(amax, float(codes[-1])) if integers else amax
        group_scale, values = _alternate(grouped, largest.clamp_min_(_SMALLEST), codes, integers)
        row_scale = divide((values * group_scale).abs().amax(dim=(1, 2)), INT8.max).clamp_min_(_SMALLEST)
        scale[start:stop, 0] = row_scale
        relative[start:stop] = (group_scale[..., 0] / row_scale[:, None]).to(torch.float8_e4m3fn).float()
    return levels.with_scale(relative, codes), scale


def _alternate(
    grouped: torch.Tensor, scale: torch.Tensor, codes: torch.Tensor, integers: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Group scales by alternating least squares, and the codes of the values (rows, groups, columns) under them."""
    values = _nearest_code(grouped / scale, codes, integers)
    for _ in range(_PASSES):
        products, squares = (grouped * values).sum(-1, keepdim=True), (values * values).sum(-1, keepdim=True)
        scale = (products / squares.clamp_min_(_SMALLEST)).clamp_min_(_SMALLEST)
        values = _nearest_code(grouped / scale, codes, integers)
    return scale, values


def _nearest_code(values: torch.Tensor, codes: torch.Tensor, integers: bool) -> torch.Tensor:
    """The nearest code: of two that are equally near the even integer, or the lower number of a codebook."""
    if integers:
        return values.round_().clamp_(float(codes[0]), float(codes[-1]))
    upper = torch.searchsorted(codes, values.contiguous())
    below, above = codes[(upper - 1).clamp_min_(0)], codes[upper.clamp_max_(len(codes) - 1)]
    return torch.where((values - above).abs_() < (values - below).abs_(), above, below)


def _choose_codes(weight: torch.Tensor, codes: torch.Tensor, columns: int) -> torch.Tensor:
    """The codebook of Gaussian groups, or one that is fitted to a weight whose groups have heavier tails."""
    out, inner = weight.shape
    count = max(1, _SAMPLED_ROWS // inner)
    if out > count:
        weight = weight[torch.linspace(0, out - 1, count, device=weight.device).long()]
    grouped = weight.float().unflatten(1, (-1, columns))
    normalized = (grouped / grouped.abs().amax(dim=-1, keepdim=True).clamp_min_(_SMALLEST)).flatten()
    sample = _draw(normalized, _SAMPLED)
    kurtosis = ((sample - sample.mean()) / (sample.std() + 1e-9)).pow(4).mean() - 3.0
    return fit_codes(normalized, len(codes)) if kurtosis > _HEAVY_TAILS else codes


def fit_codes(values: torch.Tensor, count: int) -> torch.Tensor:
    """``count`` codes, float32 ascending, of least squared error on at most 300,000 of the values (Lloyd-Max)."""
    sample = _draw(values.flatten(), _FITTED)
    codes = torch.quantile(sample, torch.linspace(0, 1, count, device=values.device))
    for _ in range(_FIT_PASSES):
        nearest = (sample[:, None] - codes).abs_().argmin(dim=1)
        means = [sample[nearest == index].mean() for index in range(count)]
        codes = torch.stack([mean if mean.isfinite() else code for mean, code in zip(means, codes, strict=True)])
    return codes.sort().values  # equal quantiles, as those of many zeros, part in any order


def _draw(values: torch.Tensor, count: int) -> torch.Tensor:
    """At most ``count`` of the values, float32, always the same on a class of device."""
    if values.numel() > count:
        generator = torch.Generator(values.device).manual_seed(0)
        index = torch.randint(0, values.numel(), (count,), device=values.device, generator=generator)
        values = values[index]
    return values.float()


def search_levels(
    weight: torch.Tensor,
    levels: GroupLevels,
    scale: torch.Tensor,
    space: SolveSpace,
    *,
    column_weight: torch.Tensor | None = None,
    row_weight: torch.Tensor | None = None,
    check: CancelCheck | None = None,
) -> tuple[GroupLevels, float]:
    """The best of a few E4M3 scales around the start, for each group; never worse than the start.

    Args:
        weight: (out, in), any float dtype.
        levels, scale: from :func:`start_levels`.
        column_weight, row_weight: as in :func:`~.scale_search.search_scale`.

    Returns:
        levels, and √(Σ error²) relative to that of the start (1 where neither has an error).
    """
    start = levels.scale
    assert start is not None
    chosen = torch.empty_like(start)
    totals = torch.zeros(2, dtype=torch.float64, device=weight.device)  # squared error of the start, and of the best
    for first, last, rows in row_slabs(weight, check):
        bits, errors = kernels.search_level_scales(
            rows / space.divisor(scale, first, last),
            start[first:last].to(torch.float8_e4m3fn).view(torch.uint8),
            levels.codes,
            column_weight,
            _STEPS,
            INT8.max,
        )
        chosen[first:last] = bits.view(torch.float8_e4m3fn).float()
        unit = scale[first:last].double().square()
        if row_weight is not None:
            unit = unit * row_weight[first:last, None]
        totals += (errors * unit).sum(dim=(1, 2))
    before, after = totals.tolist()
    return levels.with_scale(chosen), math.sqrt(after / before) if before > 0 else 1.0
