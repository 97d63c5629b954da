"""Beam search over the roundings of a block of columns, in Triton. All arithmetic is float32, without fused multiply-add."""

import functools
import operator
from collections.abc import Callable

import torch
import triton
import triton.language as tl

from ..element_format import ElementArithmetic
from .launcher import Launcher
from .quantize import SEPARATE
from .rounding import element_constants, new_results

__all__ = ["CONFIG", "MAX_BEAM_WIDTH", "beam_config", "round_block_beam"]

# Constexpr values and warps. A program has STATES partial roundings of STATES / beam width rows. With one warp, partial
# roundings are exchanged without shared memory.
CONFIG = ({"COLUMNS": 128, "PART": 16, "STATES": 16}, 1)
MAX_BEAM_WIDTH = CONFIG[0]["STATES"]


@triton.jit
def _nearest_elements(value, MANTISSA: tl.constexpr, SMALLEST: tl.constexpr, LARGEST: tl.constexpr):
    """The nearest value of the element format, ties to even, and the one on the other side of ``value``."""
    magnitude = tl.minimum(tl.abs(value), LARGEST)
    magic = 12582912.0
    step, inverse = 1.0, 1.0
    if MANTISSA >= 0:
        exponent = magnitude.to(tl.int32, bitcast=True) & 0x7F800000  # leaves 2^⌊log2|value|⌋
        # The lower bound keeps the step a normal power of two, so that its inverse is exact.
        exponent = tl.maximum(exponent - (MANTISSA << 23), (127 + SMALLEST) << 23)
        step = exponent.to(tl.float32, bitcast=True)
        inverse = ((254 << 23) - exponent).to(tl.float32, bitcast=True)
    first = ((magnitude * inverse + magic) - magic) * step
    second = tl.where(magnitude < first, first - step, first + step)
    second = tl.where(second > LARGEST, first, second)
    return tl.where(value < 0, -first, first), tl.where(value < 0, -second, second)


@triton.jit
def _nearest_levels(value, scale, codes, LEVELS: tl.constexpr, LARGEST: tl.constexpr):
    """The nearest of round(codes · scale), clamped, the lower one of two, and the one on the other side of ``value``."""
    magic = 12582912.0
    below, above = value, value
    for index in tl.static_range(LEVELS):
        level = (tl.load(codes + index) * scale + magic) - magic
        level = tl.minimum(tl.maximum(level, -LARGEST), LARGEST)
        if index == 0:
            below, above = level, level
        else:
            above = tl.where(above < value, level, above)
            below = tl.where(level < value, level, below)
    below = tl.where(above < value, above, below)
    upper = tl.abs(above - value) < tl.abs(below - value)
    return tl.where(upper, above, below), tl.where(upper, below, above)


@triton.jit
def _trace_back(
    survivors, state, weight, scale, values, errors, row, columns, rows, group_rows, scale_column_stride, row_stride,
    LANES: tl.constexpr,
):  # fmt: skip
    """Follow a state of each row from the first column to the last, and store its values and errors."""
    inside = row < rows
    for i in range(0, columns):
        at = tl.cast(i, tl.int64) * row_stride + row
        w = tl.load(weight + at, mask=inside, other=0.0)
        s = tl.load(scale + i * scale_column_stride + row // group_rows, mask=inside, other=1.0)
        packed = tl.load(survivors + at * LANES + state, mask=inside, other=0)
        value = (packed >> 16).to(tl.int16).to(tl.float16, bitcast=True)
        state = packed & 0xFFFF
        tl.store(values + at, value, mask=inside)
        tl.store(errors + at, value.to(tl.float32) * s - w, mask=inside)


@triton.jit
def _select(cost_first, cost_second, ROWS: tl.constexpr, LANES: tl.constexpr):
    """Continuation 0 and those of least cost of each row, in ascending order, and their costs, (ROWS · LANES,).

    Continuation 2k is that of state k by its nearest value, 2k + 1 the one by the other value; of equal costs the first.
    """
    total = tl.reshape(tl.join(cost_first, cost_second), [ROWS, 2 * LANES])
    option = tl.arange(0, 2 * LANES)
    # The rank of a continuation is the number of those that go before it. Sums are over the first axis, which is in
    # registers of one thread.
    ranked = tl.where(option[None, :] == 0, float("-inf"), total)  # nearest values only
    other, own = tl.trans(ranked)[:, :, None], ranked[None, :, :]
    before = (other < own) | ((other == own) & (option[:, None, None] < option[None, None, :]))
    rank = tl.sum(before.to(tl.int32), axis=0)
    kept = tl.trans(rank)[:, :, None] == tl.arange(0, LANES)[None, None, :]
    best = tl.sum(tl.where(kept, option[:, None, None], 0), axis=0)
    cost = tl.gather(total, best, axis=1)
    return tl.reshape(best, [ROWS * LANES]), tl.reshape(cost, [ROWS * LANES])


@triton.jit
def _pick(first, second, best, ROWS: tl.constexpr, LANES: tl.constexpr):
    """The values of continuations, (ROWS · LANES,)."""
    both = tl.reshape(tl.join(first, second), [ROWS, 2 * LANES])
    return tl.reshape(tl.gather(both, tl.reshape(best, [ROWS, LANES]), axis=1), [ROWS * LANES])


@triton.jit
def _round_block_beam(
    weight,
    shift,
    coupling,
    column_cost,
    scale,
    codes,
    level_scale,
    survivors,
    values,
    errors,
    columns,
    rows,
    group_rows,
    scale_column_stride,
    row_stride,
    WIDTH: tl.constexpr,
    LEVELS: tl.constexpr,
    MANTISSA: tl.constexpr,
    SMALLEST: tl.constexpr,
    LARGEST: tl.constexpr,
    COLUMNS: tl.constexpr,
    PART: tl.constexpr,
    STATES: tl.constexpr,
    LANES: tl.constexpr,
):
    # A program has ROWS rows of LANES partial roundings ("states"): that with nearest values only, then others in order of
    # their cost; the last LANES − WIDTH are unused.
    ROWS: tl.constexpr = STATES // LANES
    PARTS: tl.constexpr = COLUMNS // PART
    state = tl.arange(0, STATES)
    row = tl.program_id(0) * ROWS + state // LANES
    inside = row < rows
    # Columns are rounded in parts. Only what is fed to the columns of one part is reordered with the states in every step;
    # what is fed to the others is reordered and added when the part is done.
    part, near_column = tl.arange(0, PARTS), tl.arange(0, PART)
    column = part[:, None] * PART + near_column[None, :]
    offsets = column.to(tl.int64)[:, :, None] * row_stride + row[None, None, :]
    fed = tl.load(shift + offsets, mask=(column < columns)[:, :, None] & inside[None, None, :], other=0.0)
    infinity = float("inf")
    cost = tl.where(state % LANES == 0, 0.0, infinity)
    for done in range(0, tl.cdiv(columns, PART)):
        own_part = tl.cdiv(columns, PART) - 1 - done
        first_column = own_part * PART
        count = tl.minimum(PART, columns - first_column)
        near = tl.sum(tl.where(part[:, None, None] == own_part, fed, 0.0), axis=0)
        made = tl.zeros([PART, STATES], tl.float32)  # errors of the columns of the part
        origin = state
        for step in range(0, count):
            own = count - 1 - step
            i = first_column + own
            at = i.to(tl.int64) * row_stride + row
            w = tl.load(weight + at, mask=inside, other=0.0)
            s = tl.load(scale + i * scale_column_stride + row // group_rows, mask=inside, other=1.0)
            feedback = tl.load(coupling + i * columns + first_column + near_column, mask=near_column < count, other=0.0)
            target = w - tl.sum(tl.where(near_column[:, None] == own, near, 0.0), axis=0)
            scaled = tl.div_rn(target, s)
            if LEVELS:
                group_scale = tl.load(level_scale + at, mask=inside, other=0.0)
                first, second = _nearest_levels(scaled, group_scale, codes, LEVELS, LARGEST)
            else:
                first, second = _nearest_elements(scaled, MANTISSA, SMALLEST, LARGEST)
            price = tl.load(column_cost + i)
            distance = first * s - target
            cost_first = cost + distance * distance * price
            distance = second * s - target
            cost_second = tl.where(first == second, infinity, cost + distance * distance * price)
            best, cost = _select(cost_first, cost_second, ROWS, LANES)
            if WIDTH < LANES:
                cost = tl.where(state % LANES < WIDTH, cost, infinity)
            value = _pick(first, second, best, ROWS, LANES)
            value = tl.where(value == 0, 0.0, value)  # without negative zeros
            # Both in 32 bits: the value as float16, and the state that it continues.
            parent = best // 2
            packed = (value.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32) << 16) | parent
            tl.store(survivors + at * LANES + state % LANES, packed, mask=inside)
            error = value * s - w
            source = (state // LANES) * LANES + parent
            origin = tl.gather(origin, source, axis=0)
            source = tl.broadcast_to(source[None, :], [PART, STATES])
            near = tl.gather(near, source, axis=1) + feedback[:, None] * error[None, :]
            made = tl.where(near_column[:, None] == own, error[None, :], tl.gather(made, source, axis=1))
        if own_part > 0:
            fed = tl.gather(fed, tl.broadcast_to(origin[None, None, :], [PARTS, PART, STATES]), axis=2)
            for step in range(0, count):
                own = count - 1 - step
                far = tl.load(coupling + (first_column + own) * columns + column, mask=column < first_column, other=0.0)
                error = tl.sum(tl.where(near_column[:, None] == own, made, 0.0), axis=0)
                fed += far[:, :, None] * error[None, None, :]
    tl.debug_barrier()  # states are read by other threads than those that stored them
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    best = tl.argmin(tl.reshape(cost, [ROWS, LANES]), axis=1)
    _trace_back(
        survivors, best, weight, scale, values, errors, row, columns, rows, group_rows, scale_column_stride, row_stride,
        LANES,
    )  # fmt: skip


def beam_config(beam_width: int) -> dict[str, int]:
    """Constexpr values for a beam width."""
    return {"WIDTH": beam_width, "LANES": triton.next_power_of_2(beam_width), **CONFIG[0]}


@functools.lru_cache(maxsize=256)
def _prepare_search(
    columns: int,
    rows: int,
    group_rows: int,
    scale_column_stride: int,
    element: ElementArithmetic,
    beam_width: int,
    levels: int,
    aligned: bool,
    device: torch.device,
) -> Callable[..., None]:
    """The launch for blocks of one shape, with all arguments but the tensors: GPTQ makes hundreds of equal ones."""
    config = beam_config(beam_width)
    constants = {"LEVELS": levels, **element_constants(element), **config}
    grid = (triton.cdiv(rows * config["LANES"], config["STATES"]),)
    run = Launcher(_round_block_beam, grid, constants, device, keep=aligned, num_warps=CONFIG[1], **SEPARATE)
    return lambda *tensors: run(*tensors, columns, rows, group_rows, scale_column_stride, rows)


def round_block_beam(
    weight,
    shift,
    coupling,
    column_cost,
    scale,
    group_rows,
    element,
    beam_width,
    codes=None,
    level_scale=None,
    *,
    out=None,
):
    """See :func:`..reference.beam.round_block_beam`; for up to :data:`.rounding.MAX_COLUMNS` columns."""
    columns, rows = weight.shape
    device, width = weight.device, triton.next_power_of_2(beam_width)
    tensors = [
        weight.contiguous(),
        shift.contiguous(),
        coupling.contiguous(),
        column_cost.contiguous(),
        scale.contiguous(),
        scale if codes is None else codes,
        scale if level_scale is None else level_scale.contiguous(),
        torch.empty(columns, rows, width, dtype=torch.int32, device=device),
        *(out or new_results(columns, rows, device)),
    ]
    run = _prepare_search(
        columns,
        rows,
        min(group_rows, rows),
        scale.shape[1] if scale.shape[0] > 1 else 0,
        element,
        beam_width,
        0 if codes is None else len(codes),
        functools.reduce(operator.or_, (tensor.data_ptr() for tensor in tensors)) % 16 == 0,
        device,
    )
    run(*tensors)
    return tensors[-2], tensors[-1]
