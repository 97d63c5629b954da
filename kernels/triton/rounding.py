"""Rounding to a grid, in Triton. All arithmetic is float32, so every card with Triton gives the same codes.

FP8 conversion instructions are not used: they exist from SM 8.9 on only, and rounding x/step by the addition of
1.5·2²³ is as exact (|x/step| < 2²²) and as fast.
"""

import math

import torch
import triton
import triton.language as tl

from ..grid import GridArithmetic

__all__ = ["CONFIGS", "MAX_COLUMNS", "round_block", "scale_errors"]

# Shipped launch configurations: kernel name → (constexpr values, warps). round_block is bound by the latency of a step:
# with one warp its sums need no shared memory, 73 µs for 128×12288 on an H200 where 4 warps take 127; 32 rows take 62,
# but do not fit the registers.
CONFIGS = {
    "round_block": ({"COLUMNS": 128, "ROWS": 16}, 1),
    "scale_errors": ({"ROWS": 1, "COLUMNS": 1024}, 4),
}
MAX_COLUMNS = CONFIGS["round_block"][0]["COLUMNS"]


@triton.jit
def _round(value, MANTISSA: tl.constexpr, SMALLEST: tl.constexpr, LARGEST: tl.constexpr):
    """The nearest grid value, ties to even."""
    value = tl.minimum(tl.maximum(value, -LARGEST), LARGEST)
    magic = 12582912.0
    if MANTISSA < 0:
        return (value + magic) - magic
    exponent = value.to(tl.int32, bitcast=True) & 0x7F800000  # leaves 2^⌊log2|value|⌋
    # The lower bound keeps the step a normal power of two, so that its inverse is exact.
    exponent = tl.maximum(exponent - (MANTISSA << 23), (127 + SMALLEST) << 23)
    step = exponent.to(tl.float32, bitcast=True)
    inverse = ((254 << 23) - exponent).to(tl.float32, bitcast=True)
    return ((value * inverse + magic) - magic) * step


@triton.jit
def _round_block(
    weight,
    shift,
    before,
    coupling,
    scale,
    values,
    errors,
    columns,
    rows,
    tile_rows,
    scale_column_stride,
    row_stride,
    HAS_BEFORE: tl.constexpr,
    MANTISSA: tl.constexpr,
    SMALLEST: tl.constexpr,
    LARGEST: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    live = row < rows
    inside = (column < columns)[:, None] & live[None, :]
    place = column.to(tl.int64)[:, None] * row_stride + row[None, :]
    target = tl.load(weight + place, mask=inside, other=0.0) - tl.load(shift + place, mask=inside, other=0.0)
    # What a step needs from memory is loaded while the step before is at work.
    last = columns - 1
    w = tl.load(weight + last.to(tl.int64) * row_stride + row, mask=live, other=0.0)
    s = tl.load(scale + last * scale_column_stride + row // tile_rows, mask=live, other=1.0)
    pull = tl.load(coupling + last * columns + column, mask=column < columns, other=0.0)
    for step in range(0, columns):
        i = last - step
        at = i.to(tl.int64) * row_stride + row
        following = tl.maximum(i - 1, 0)
        next_w = tl.load(weight + following.to(tl.int64) * row_stride + row, mask=live, other=0.0)
        next_s = tl.load(scale + following * scale_column_stride + row // tile_rows, mask=live, other=1.0)
        next_pull = tl.load(coupling + following * columns + column, mask=column < columns, other=0.0)
        own = tl.sum(tl.where(column[:, None] == i, target, 0.0), axis=0)
        value = _round(tl.div_rn(own, s), MANTISSA, SMALLEST, LARGEST)
        error = value * s - w
        change = error
        if HAS_BEFORE:
            change = error - tl.load(before + at, mask=live, other=0.0)
        tl.store(values + at, value.to(tl.float16), mask=live)
        tl.store(errors + at, error, mask=live)
        target -= pull[:, None] * change[None, :]
        w, s, pull = next_w, next_s, next_pull


@triton.jit
def _scale_errors(
    weight,
    scale,
    ratios,
    column_weight,
    errors,
    out,
    inner,
    row_stride,
    candidates,
    tile_rows,
    tile_columns,
    tiles,
    group,
    groups,
    HAS_WEIGHT: tl.constexpr,
    MANTISSA: tl.constexpr,
    SMALLEST: tl.constexpr,
    LARGEST: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CANDIDATES: tl.constexpr,
):
    member = tl.program_id(0).to(tl.int64)  # a group of rows
    tile = tl.program_id(1)
    first, last = tile * tile_columns, tl.minimum((tile + 1) * tile_columns, inner)
    start = tl.load(scale + (member * group // tile_rows) * tiles + tile)
    index = tl.arange(0, CANDIDATES)
    total = tl.zeros([CANDIDATES], tl.float32)
    for top in range(0, group, ROWS):
        row = member * group + top + tl.arange(0, ROWS)
        live_row = (top + tl.arange(0, ROWS) < group) & (row < out)
        for left in range(first, last, COLUMNS):
            column = left + tl.arange(0, COLUMNS)
            live = live_row[:, None] & (column < last)[None, :]
            w = tl.load(weight + row[:, None] * row_stride + column[None, :], mask=live, other=0.0).to(tl.float32)
            if HAS_WEIGHT:
                d = tl.load(column_weight + column, mask=column < last, other=0.0)
            for candidate in range(0, candidates):
                s = start * tl.load(ratios + candidate)
                scaled = tl.div_rn(w, tl.zeros_like(w) + s)
                error = _round(scaled, MANTISSA, SMALLEST, LARGEST) - scaled
                square = error * error
                if HAS_WEIGHT:
                    square *= d[None, :]
                total += tl.where(index == candidate, tl.sum(tl.sum(square, axis=1), axis=0), 0.0)
    place = index.to(tl.int64) * groups * tiles + member * tiles + tile
    tl.store(errors + place, total, mask=index < candidates)


def grid_constants(grid: GridArithmetic) -> dict[str, object]:
    """Constexpr values of a grid; SMALLEST as the exponent of two."""
    smallest = math.frexp(grid.smallest)[1] - 1 if grid.mantissa >= 0 else 0
    return {"MANTISSA": grid.mantissa, "SMALLEST": smallest, "LARGEST": grid.largest}


def square_tile(columns: int) -> dict[str, int]:
    """The configuration of scale_errors where a tile is a square of so many columns: several of its rows at once."""
    columns = triton.next_power_of_2(min(columns, 128))
    return {"ROWS": 1024 // columns, "COLUMNS": columns}


def round_block(weight, shift, before, coupling, scale, tile_rows, grid):
    """See :func:`..reference.round_block`; for up to :data:`MAX_COLUMNS` columns."""
    columns, rows = weight.shape
    values = torch.empty(columns, rows, dtype=torch.float16, device=weight.device)
    errors = torch.empty(columns, rows, dtype=torch.float32, device=weight.device)
    constants, warps = CONFIGS["round_block"]
    _round_block[(triton.cdiv(rows, constants["ROWS"]),)](
        weight.contiguous(),
        shift.contiguous(),
        shift if before is None else before.contiguous(),
        coupling.contiguous(),
        scale.contiguous(),
        values,
        errors,
        columns,
        rows,
        min(tile_rows, rows),
        scale.shape[1] if scale.shape[0] > 1 else 0,
        rows,
        HAS_BEFORE=before is not None,
        **grid_constants(grid),
        **constants,
        num_warps=warps,
    )
    return values, errors


def scale_errors(weight, scale, ratios, column_weight, tile_rows, tile_columns, group, grid):
    """See :func:`..reference.scale_errors`."""
    weight = weight if weight.stride(1) == 1 else weight.contiguous()
    out, inner = weight.shape
    groups, tiles = triton.cdiv(out, group), scale.shape[1]
    errors = torch.empty(len(ratios), groups, tiles, dtype=torch.float32, device=weight.device)
    constants, warps = CONFIGS["scale_errors"]
    if group > 1:
        constants = square_tile(tile_columns)
    _scale_errors[(groups, tiles)](
        weight,
        scale.contiguous(),
        ratios,
        ratios if column_weight is None else column_weight,
        errors,
        out,
        inner,
        weight.stride(0),
        len(ratios),
        tile_rows,
        tile_columns,
        tiles,
        group,
        groups,
        HAS_WEIGHT=column_weight is not None,
        **grid_constants(grid),
        **constants,
        CANDIDATES=triton.next_power_of_2(len(ratios)),
        num_warps=warps,
    )
    return errors
