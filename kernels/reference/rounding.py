"""Rounding to a grid, in plain torch."""

import torch

from ..grid import GridArithmetic

__all__ = ["grid_step", "round_to_grid", "round_block", "scale_errors"]

_EXPONENT = 0x7F800000  # the exponent bits of a float32: masking all others leaves 2^⌊log2|x|⌋


def grid_step(values: torch.Tensor, grid: GridArithmetic) -> torch.Tensor | float:
    """Distance of neighbouring grid values around each of ``values`` (float32): a power of two."""
    if grid.mantissa < 0:
        return 1.0
    binade = (values.contiguous().view(torch.int32) & _EXPONENT).view(torch.float32)
    return (binade * 2.0**-grid.mantissa).clamp_min_(grid.smallest)


def round_to_grid(values: torch.Tensor, grid: GridArithmetic) -> torch.Tensor:
    """The nearest grid value of each of ``values`` (float32), ties to even."""
    clamped = values.clamp(-grid.largest, grid.largest)
    step = grid_step(clamped, grid)
    return (clamped / step).round_() * step


def round_block(
    weight: torch.Tensor,
    shift: torch.Tensor,
    before: torch.Tensor | None,
    coupling: torch.Tensor | None,
    scale: torch.Tensor,
    tile_rows: int,
    grid: GridArithmetic,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Round a block of B columns of R rows, the last column first, feeding each error to the block's other columns.

    For column i:  q_i = round((w_i − shift_i)/s_i),  e_i = s_i·q_i − w_i,  shift_c += (e_i − before_i)·coupling[i, c].

    With ``coupling`` strictly lower triangular (the unit Cholesky factor) this is one block of sequential rounding;
    with the off-diagonal part of H/diag(H) it is one block of a coordinate descent sweep, which starts from the errors
    ``before``.

    Args:
        weight: float32 (B, R): columns of the weight, transposed; R rows of the weight.
        shift: float32 (B, R): what errors outside this block ask for.
        before: float32 (B, R) errors that are replaced, or None for none.
        coupling: float32 (B, B), zero diagonal; None for columns that do not depend on each other.
        scale: float32 (B or 1, ⌈R/tile_rows⌉), shared by ``tile_rows`` neighbouring rows.
        grid: where codes must lie.

    Returns:
        q as float16 (B, R), which holds every grid value exactly, and e as float32 (B, R).
    """
    columns, rows = weight.shape
    spread = scale.repeat_interleave(tile_rows, dim=1)[:, :rows] if scale.shape[1] > 1 else scale
    if coupling is None:
        values = round_to_grid((weight - shift) / spread, grid)
        return values.half(), values * spread - weight
    values = torch.empty(columns, rows, dtype=torch.float16, device=weight.device)
    errors, shift = torch.empty_like(weight), shift.clone()
    for column in range(columns - 1, -1, -1):
        step = spread[column if spread.shape[0] > 1 else 0]
        value = round_to_grid((weight[column] - shift[column]) / step, grid)
        error = value * step - weight[column]
        values[column], errors[column] = value, error
        change = error if before is None else error - before[column]
        shift.addr_(coupling[column], change)
    return values, errors


def scale_errors(
    weight: torch.Tensor,
    scale: torch.Tensor,
    ratios: torch.Tensor,
    column_weight: torch.Tensor | None,
    tile_rows: int,
    tile_columns: int,
    group: int,
    grid: GridArithmetic,
) -> torch.Tensor:
    """Σ d_j·(round(w/(s·r)) − w/(s·r))² over each tile, for every ratio r.

    Args:
        weight: (out, in), any float dtype.
        scale: float32 (⌈out/tile_rows⌉, ⌈in/tile_columns⌉).
        ratios: float32 (n,), candidates to multiply ``scale`` by.
        column_weight: float32 (in,) d, or None for ones.
        group: how many neighbouring rows are added up; divides ``tile_rows``.
        grid: where codes must lie.

    Returns:
        float32 (n, ⌈out/group⌉, ⌈in/tile_columns⌉), in units of (s·r)².
    """
    out, inner = weight.shape
    groups, tiles = -(-out // group), scale.shape[1]
    errors = torch.empty(len(ratios), groups, tiles, device=weight.device)
    rows = torch.arange(out, device=weight.device) // tile_rows
    spread = scale[rows].repeat_interleave(tile_columns, dim=1)[:, :inner] if tiles > 1 else scale[rows]
    for candidate, ratio in enumerate(ratios):
        scaled = weight.float() / (spread * ratio)
        square = round_to_grid(scaled, grid).sub_(scaled).square_()
        if column_weight is not None:
            square *= column_weight
        padded = torch.nn.functional.pad(square, (0, tiles * tile_columns - inner, 0, groups * group - out))
        errors[candidate] = padded.view(groups, group, tiles, tile_columns).sum(dim=(1, 3))
    return errors
