"""Beam search over the roundings of a block of columns, in plain torch."""

import torch

from ..element_format import ElementArithmetic
from .rounding import element_step, enclosing_levels, store_results

__all__ = ["nearest_elements", "nearest_levels", "round_block_beam"]


def nearest_elements(values: torch.Tensor, element: ElementArithmetic) -> tuple[torch.Tensor, torch.Tensor]:
    """The nearest value of the element format, ties to even, and the one on the other side of each of ``values`` (float32).

    The second is farther from zero where a value is representable, and equals the first beyond the largest magnitude.
    """
    magnitude = values.abs().clamp_max_(element.largest)
    step = element_step(magnitude, element)
    first = (magnitude / step).round_() * step
    second = torch.where(magnitude < first, first - step, first + step)
    second = torch.where(second > element.largest, first, second)
    negative = values < 0
    return torch.where(negative, -first, first), torch.where(negative, -second, second)


def nearest_levels(
    values: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, largest: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The nearest level, the lower one of two that are equally near, and the one on the other side of each value.

    Beyond the last level, and at the lowest one, both are that level.

    Args: see :func:`.rounding.round_to_levels`.
    """
    below, above = enclosing_levels(values, codes, scale, largest)
    upper = (above - values).abs_() < (below - values).abs_()
    return torch.where(upper, above, below), torch.where(upper, below, above)


def round_block_beam(
    weight: torch.Tensor,
    shift: torch.Tensor,
    coupling: torch.Tensor,
    column_cost: torch.Tensor,
    scale: torch.Tensor,
    group_rows: int,
    element: ElementArithmetic,
    beam_width: int,
    codes: torch.Tensor | None = None,
    level_scale: torch.Tensor | None = None,
    *,
    out: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Round a block of B columns as GPTQ does, keeping the best ``beam_width`` partial roundings of each row.

    From the last column to the first, every kept partial rounding is continued with the two values q next to

        t_i = w_i − shift_i − Σ_{c>i} e_c·coupling[c, i],

    which adds (s_i·q − t_i)²·column_cost_i to its cost, and those of least cost are kept. The one with nearest values only,
    which is that of :func:`.rounding.round_block`, is always kept and comes first, so that no row costs more than there.
    Of equal costs, the continuation of an earlier one goes first, and its nearest value before the other. Source: K-best
    search of the closest lattice point (M-algorithm).

    Args:
        weight: float32 (B, R): B columns of R weight rows, transposed.
        shift: float32 (B, R): error feedback from columns outside this block.
        coupling: float32 (B, B), strictly lower triangular: L_ij/L_jj of the Cholesky factor of H.
        column_cost: float32 (B,): L_jj².
        scale, group_rows, element, codes, level_scale, out: see :func:`.rounding.round_block`.
        beam_width: number of partial roundings per row.

    Returns:
        q as float16 (B, R) and e = s·q − w as float32 (B, R) of the rounding of least cost of each row.
    """
    columns, rows = weight.shape
    spread = scale.repeat_interleave(group_rows, dim=1)[:, :rows] if scale.shape[1] > 1 else scale
    lane = torch.arange(rows, device=weight.device)
    shift = shift.repeat(1, beam_width)  # (B, beam · R)
    cost = weight.new_full((beam_width, rows), torch.inf)
    cost[0] = 0
    chosen, parents = weight.new_empty(columns, beam_width, rows), lane.new_empty(columns, beam_width, rows)
    for column in range(columns - 1, -1, -1):
        step = spread[column if spread.shape[0] > 1 else 0]
        target = weight[column] - shift[column].view(beam_width, rows)
        if codes is None or level_scale is None:
            pair = nearest_elements(target / step, element)
        else:
            scaled = (target / step).t()
            pair = (found.t() for found in nearest_levels(scaled, codes, level_scale[column], element.largest))
        values = torch.stack([*pair], dim=1)  # (beam, 2, R)
        distance = values * step - target[:, None]
        total = distance.square_().mul_(column_cost[column]).add_(cost[:, None])
        total[:, 1].masked_fill_(values[:, 0] == values[:, 1], torch.inf)
        total = total.flatten(0, 1)
        ranked = torch.cat([torch.full_like(total[:1], -torch.inf), total[1:]])
        best = ranked.argsort(dim=0, stable=True)[:beam_width]
        cost = total.gather(0, best)
        parents[column] = best // 2
        chosen[column] = values.flatten(0, 1).gather(0, best) + 0.0  # without negative zeros
        errors = chosen[column] * step - weight[column]
        kept = (parents[column] * rows + lane).flatten()
        shift = shift[:column].index_select(1, kept).add_(coupling[column, :column, None] * errors.flatten())
    values, state = weight.new_empty(columns, rows), cost.argmin(dim=0)
    for column in range(columns):
        values[column], state = chosen[column, state, lane], parents[column, state, lane]
    return store_results(values.half(), values * spread - weight, out)
