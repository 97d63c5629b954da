"""Rounding to an element format, in plain torch."""

import torch

from ..element_format import ElementArithmetic

__all__ = [
    "element_step",
    "enclosing_levels",
    "round_block",
    "round_to_element",
    "round_to_levels",
    "scale_errors",
    "search_level_scales",
    "store_results",
]

_EXPONENT = 0x7F800000  # exponent bits of a float32; only they set, the value is 2^⌊log2|x|⌋


def element_step(values: torch.Tensor, element: ElementArithmetic) -> torch.Tensor | float:
    """Spacing of the element format around each of ``values`` (float32): a power of two."""
    if element.mantissa < 0:
        return 1.0
    binade = (values.contiguous().view(torch.int32) & _EXPONENT).view(torch.float32)
    return (binade * 2.0**-element.mantissa).clamp_min_(element.smallest)


def round_to_element(values: torch.Tensor, element: ElementArithmetic) -> torch.Tensor:
    """Round ``values`` (float32) to the nearest value of the element format, ties to even; clamp at its largest value."""
    clamped = values.clamp(-element.largest, element.largest)
    if element.mantissa < 0:
        return clamped.round_()
    step = element_step(clamped, element)
    return (clamped / step).round_() * step


def enclosing_levels(
    values: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, largest: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The two levels that enclose each value, the lower one first; beyond the last level both are that level.

    Args: see :func:`round_to_levels`.
    """
    levels = (scale[..., None] * codes).round_().clamp_(-largest, largest)
    upper = torch.searchsorted(levels, values.contiguous())
    above = levels.gather(-1, upper.clamp(max=len(codes) - 1))
    return levels.gather(-1, upper.sub_(1).clamp_(min=0)), above


def round_to_levels(values: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, largest: float) -> torch.Tensor:
    """Round each of ``values`` to the nearest of its levels, the lower one of two that are equally near.

    Args:
        values: float32 (…, n).
        codes: float32 (k,), ascending.
        scale: float32 (…), not negative: the levels of ``values[i]`` are round(codes · scale[i]), clamped to ±``largest``.
    """
    below, above = enclosing_levels(values, codes, scale, largest)
    return torch.where((above - values).abs_() < (below - values).abs_(), above, below)


def round_block(
    weight: torch.Tensor,
    shift: torch.Tensor,
    before: torch.Tensor | None,
    coupling: torch.Tensor | None,
    scale: torch.Tensor,
    group_rows: int,
    element: ElementArithmetic,
    codes: torch.Tensor | None = None,
    level_scale: torch.Tensor | None = None,
    *,
    out: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Round a block of B columns one by one, last column first, with error feedback to the other columns of the block.

    For column i:  q_i = round((w_i − shift_i)/s_i),  e_i = s_i·q_i − w_i,  shift_c += (e_i − before_i)·coupling[i, c].

    With a strictly lower triangular ``coupling`` (off-diagonal part of the unit Cholesky factor) this is one block of
    GPTQ. With the off-diagonal part of H/diag(H) it is one block of a coordinate-descent pass that starts from the
    errors ``before``.

    Args:
        weight: float32 (B, R): B columns of R weight rows, transposed.
        shift: float32 (B, R): error feedback from columns outside this block.
        before: float32 (B, R): errors of the previous pass, or None for zeros.
        coupling: float32 (B, B) with zero diagonal; None if columns are independent.
        scale: float32 (B or 1, ⌈R/group_rows⌉).
        group_rows: height of a scale group in rows.
        element: arithmetic of the element format.
        codes, level_scale: float32 (k,) and (B, R); q_i is then one of the levels of :func:`round_to_levels` with the scale
            of its column and row. None: any element.
        out: where the results are written, contiguous; the second may be ``before``. None: to new memory.

    Returns:
        q as float16 (B, R), exact for every supported element format, and e as float32 (B, R).
    """
    columns, rows = weight.shape
    spread = scale.repeat_interleave(group_rows, dim=1)[:, :rows] if scale.shape[1] > 1 else scale

    def nearest(scaled: torch.Tensor, column: int | slice) -> torch.Tensor:
        if codes is None or level_scale is None:
            return round_to_element(scaled, element)
        return round_to_levels(scaled[..., None], codes, level_scale[column], element.largest)[..., 0]

    if coupling is None:
        values = nearest((weight - shift) / spread, slice(None))
        return store_results(values.half(), values * spread - weight, out)
    values, errors, shift = torch.empty_like(weight), torch.empty_like(weight), shift.clone()
    # Views of the columns, made at once: on a CPU, indexing takes as long as the arithmetic on short columns.
    steps = spread.unbind() if spread.shape[0] > 1 else spread.unbind() * columns
    unbound = (*(tensor.unbind() for tensor in (weight, shift, values, errors, coupling)), steps)
    for column, (target, shifted, value, error, coupled, step) in reversed(list(enumerate(zip(*unbound, strict=True)))):
        value.copy_(nearest((target - shifted).div_(step), column))
        torch.mul(value, step, out=error).sub_(target)
        shift.addr_(coupled, error if before is None else error - before[column])
    return store_results(values.half(), errors, out)


def store_results(
    values: torch.Tensor, errors: torch.Tensor, out: tuple[torch.Tensor, torch.Tensor] | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The results of a block, copied to ``out`` where it is given."""
    return (values, errors) if out is None else (out[0].copy_(values), out[1].copy_(errors))


def scale_errors(
    weight: torch.Tensor,
    scale: torch.Tensor,
    ratios: torch.Tensor,
    column_weight: torch.Tensor | None,
    group_rows: int,
    group_columns: int,
    sum_rows: int,
    element: ElementArithmetic,
) -> torch.Tensor:
    """Σ d_j·(round(w/(s·r)) − w/(s·r))² over parts of each scale group, for every ratio r.

    Args:
        weight: (out, in), any float dtype.
        scale: float32 (⌈out/group_rows⌉, ⌈in/group_columns⌉).
        ratios: float32 (n,), factors of ``scale`` to try.
        column_weight: float32 (in,) d, or None for ones.
        group_rows, group_columns: shape of a scale group.
        sum_rows: adjacent rows per sum; divides ``group_rows``.
        element: arithmetic of the element format.

    Returns:
        float32 (n, ⌈out/sum_rows⌉, ⌈in/group_columns⌉), in units of (s·r)².
    """
    out, inner = weight.shape
    sums, groups = -(-out // sum_rows), scale.shape[1]
    errors = torch.empty(len(ratios), sums, groups, device=weight.device)
    spread = scale  # as it is, if a group is a row or all rows
    if group_rows > 1 and scale.shape[0] > 1:
        spread = spread[torch.arange(out, device=weight.device) // group_rows]
    if groups > 1:
        spread = spread.repeat_interleave(group_columns, dim=1)[:, :inner]
    margins = (0, groups * group_columns - inner, 0, sums * sum_rows - out)
    for candidate, ratio in enumerate(ratios):
        scaled = weight.float() / (spread * ratio)
        square = round_to_element(scaled, element).sub_(scaled).square_()
        if column_weight is not None:
            square *= column_weight
        if any(margins):
            square = torch.nn.functional.pad(square, margins)
        errors[candidate] = square.view(sums, sum_rows, groups, group_columns).sum(dim=(1, 3))
    return errors


_LARGEST_BITS = 0x7E  # of a positive finite E4M3 number


def search_level_scales(
    values: torch.Tensor,
    bits: torch.Tensor,
    codes: torch.Tensor,
    column_weight: torch.Tensor | None,
    steps: int,
    largest: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The E4M3 scale of each group whose levels are nearest to its values, among those around a start.

    Minimised is Σ d_j·(level − v_j)², where the levels are those of :func:`round_to_levels`. Tried are the numbers up to
    ``steps`` below and above the start, the nearer ones first; the start stays where none is better.

    Args:
        values: float32 (rows, columns).
        bits: uint8 (rows, groups): E4M3 scales of groups of adjacent columns, not negative.
        codes: float32 (k,), ascending.
        column_weight: float32 (columns,) d, or None for ones.
        steps: distance of the farthest scale that is tried.
        largest: largest magnitude of a level.

    Returns:
        bits of the best scales, uint8 (rows, groups), and Σ of the start and of the best, float32 (2, rows, groups).
    """
    groups = bits.shape[1]
    grouped = values.unflatten(1, (groups, -1))
    weights = None if column_weight is None else column_weight.view(groups, -1)

    def measure(candidate: torch.Tensor) -> torch.Tensor:
        scale = candidate.view(torch.float8_e4m3fn).float()
        square = round_to_levels(grouped, codes, scale, largest).sub_(grouped).square_()
        return (square if weights is None else square.mul_(weights)).sum(dim=2)

    best, start = bits, measure(bits)
    least = start
    for step in (sign * distance for distance in range(1, steps + 1) for sign in (1, -1)):
        candidate = (bits.int() + step).clamp_(0, _LARGEST_BITS).to(torch.uint8)
        error = measure(candidate)
        better = error < least
        best, least = torch.where(better, candidate, best), torch.where(better, error, least)
    return best, torch.stack([start, least])
