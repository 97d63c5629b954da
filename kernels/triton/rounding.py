"""Rounding to an element format, in Triton. All arithmetic is float32, so that every GPU gives the same quantized values.

FP8 conversion instructions are not used: they exist only from SM 8.9 on, and rounding x/step by adding 1.5·2²³ is as
exact (|x/step| < 2²²) and as fast.
"""

import functools
import math
import operator
from collections.abc import Callable

import torch
import triton
import triton.language as tl

from ..element_format import ElementArithmetic
from .launcher import Launcher

__all__ = ["CONFIGS", "MAX_COLUMNS", "round_block", "scale_errors", "search_level_scales"]

# Shipped launch configurations: kernel name → (constexpr values, warps). round_block is bound by the latency of one
# column: with one warp its reductions need no shared memory. 128×12288 takes 73 µs on an H200, 127 µs with 4 warps;
# 32 rows take 62 µs but spill registers.
CONFIGS = {
    "round_block": ({"COLUMNS": 128, "ROWS": 16}, 1),
    "scale_errors": ({"ROWS": 1, "COLUMNS": 1024}, 4),
    "search_level_scales": ({"WEIGHTS": 1024}, 4),
}
MAX_COLUMNS = CONFIGS["round_block"][0]["COLUMNS"]


@triton.jit
def _round(value, MANTISSA: tl.constexpr, SMALLEST: tl.constexpr, LARGEST: tl.constexpr):
    """Round to the nearest value of the element format, ties to even."""
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
def _round_to_level(value, scale, codes, LEVELS: tl.constexpr, LARGEST: tl.constexpr):
    """Nearest of round(codes · scale), clamped, the lower one of two that are equally near."""
    magic = 12582912.0
    best = value * 0.0
    least = best + float("inf")
    for index in tl.static_range(LEVELS):
        level = (tl.load(codes + index) * scale + magic) - magic
        level = tl.minimum(tl.maximum(level, -LARGEST), LARGEST)
        distance = tl.abs(value - level)
        nearer = distance < least
        best = tl.where(nearer, level, best)
        least = tl.where(nearer, distance, least)
    return best


@triton.jit
def _round_block(
    weight,
    shift,
    before,
    coupling,
    scale,
    codes,
    level_scale,
    values,
    errors,
    columns,
    rows,
    group_rows,
    scale_column_stride,
    row_stride,
    HAS_BEFORE: tl.constexpr,
    LEVELS: tl.constexpr,
    MANTISSA: tl.constexpr,
    SMALLEST: tl.constexpr,
    LARGEST: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    inside_row = row < rows
    inside = (column < columns)[:, None] & inside_row[None, :]
    offsets = column.to(tl.int64)[:, None] * row_stride + row[None, :]
    target = tl.load(weight + offsets, mask=inside, other=0.0) - tl.load(shift + offsets, mask=inside, other=0.0)
    # Software pipelining: the loads of the next column are issued while this one is computed.
    last = columns - 1
    w = tl.load(weight + last.to(tl.int64) * row_stride + row, mask=inside_row, other=0.0)
    s = tl.load(scale + last * scale_column_stride + row // group_rows, mask=inside_row, other=1.0)
    feedback = tl.load(coupling + last * columns + column, mask=column < columns, other=0.0)
    if LEVELS:
        group_scale = tl.load(level_scale + last.to(tl.int64) * row_stride + row, mask=inside_row, other=0.0)
    for step in range(0, columns):
        i = last - step
        at = i.to(tl.int64) * row_stride + row
        following = tl.maximum(i - 1, 0)
        next_w = tl.load(weight + following.to(tl.int64) * row_stride + row, mask=inside_row, other=0.0)
        next_s = tl.load(scale + following * scale_column_stride + row // group_rows, mask=inside_row, other=1.0)
        next_feedback = tl.load(coupling + following * columns + column, mask=column < columns, other=0.0)
        own = tl.sum(tl.where(column[:, None] == i, target, 0.0), axis=0)
        scaled = tl.div_rn(own, s)
        if LEVELS:
            next_at = following.to(tl.int64) * row_stride + row
            next_group_scale = tl.load(level_scale + next_at, mask=inside_row, other=0.0)
            value = _round_to_level(scaled, group_scale, codes, LEVELS, LARGEST)
        else:
            value = _round(scaled, MANTISSA, SMALLEST, LARGEST)
        error = value * s - w
        change = error
        if HAS_BEFORE:
            change = error - tl.load(before + at, mask=inside_row, other=0.0)
        tl.store(values + at, value.to(tl.float16), mask=inside_row)
        tl.store(errors + at, error, mask=inside_row)
        target -= feedback[:, None] * change[None, :]
        w, s, feedback = next_w, next_s, next_feedback
        if LEVELS:
            group_scale = next_group_scale


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
    group_rows,
    group_columns,
    groups,
    sum_rows,
    sums,
    HAS_WEIGHT: tl.constexpr,
    MANTISSA: tl.constexpr,
    SMALLEST: tl.constexpr,
    LARGEST: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CANDIDATES: tl.constexpr,
):
    part = tl.program_id(0).to(tl.int64)  # sum_rows adjacent rows
    group = tl.program_id(1)
    first, last = group * group_columns, tl.minimum((group + 1) * group_columns, inner)
    start = tl.load(scale + (part * sum_rows // group_rows) * groups + group)
    index = tl.arange(0, CANDIDATES)
    total = tl.zeros([CANDIDATES], tl.float32)
    for top in range(0, sum_rows, ROWS):
        row = part * sum_rows + top + tl.arange(0, ROWS)
        inside_row = (top + tl.arange(0, ROWS) < sum_rows) & (row < out)
        for left in range(first, last, COLUMNS):
            column = left + tl.arange(0, COLUMNS)
            inside = inside_row[:, None] & (column < last)[None, :]
            w = tl.load(weight + row[:, None] * row_stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
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
    offsets = index.to(tl.int64) * sums * groups + part * groups + group
    tl.store(errors + offsets, total, mask=index < candidates)


@triton.jit
def _decode_e4m3(bits):
    """The positive float32 of E4M3 bits, int32."""
    exponent, mantissa = bits >> 3, bits & 7
    normal = ((exponent + 120) << 23 | mantissa << 20).to(tl.float32, bitcast=True)
    return tl.where(exponent > 0, normal, mantissa.to(tl.float32) * 0.001953125)


@triton.jit
def _search_level_scales(
    values,
    bits,
    codes,
    column_weight,
    best_bits,
    errors,
    groups,
    row_stride,
    count,
    steps,
    HAS_WEIGHT: tl.constexpr,
    LEVELS: tl.constexpr,
    LARGEST: tl.constexpr,
    COLUMNS: tl.constexpr,
    GROUPS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    inside = group < groups
    column = group[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    v = tl.load(values + row * row_stride + column, mask=inside[:, None], other=0.0)
    if HAS_WEIGHT:
        d = tl.load(column_weight + column, mask=inside[:, None], other=0.0)
    start = tl.load(bits + row * groups + group, mask=inside, other=0).to(tl.int32)
    best, least, first = start, tl.zeros([GROUPS], tl.float32), tl.zeros([GROUPS], tl.float32)
    for index in range(0, 2 * steps + 1):
        step = (index + 1) // 2
        step = tl.where(index % 2 == 1, step, -step)
        candidate = tl.minimum(tl.maximum(start + step, 0), 126)
        scale = _decode_e4m3(candidate)[:, None]
        difference = _round_to_level(v, scale, codes, LEVELS, LARGEST) - v
        square = difference * difference
        if HAS_WEIGHT:
            square *= d
        error = tl.sum(square, axis=1)
        if index == 0:
            least, first = error, error
        better = error < least
        best = tl.where(better, candidate, best)
        least = tl.where(better, error, least)
    at = row * groups + group
    tl.store(best_bits + at, best.to(tl.uint8), mask=inside)
    tl.store(errors + at, first, mask=inside)
    tl.store(errors + count + at, least, mask=inside)


def element_constants(element: ElementArithmetic) -> dict[str, object]:
    """Constexpr values of an element format; SMALLEST as an exponent of two."""
    smallest = math.frexp(element.smallest)[1] - 1 if element.mantissa >= 0 else 0
    return {"MANTISSA": element.mantissa, "SMALLEST": smallest, "LARGEST": element.largest}


def square_group_config(columns: int) -> dict[str, int]:
    """Configuration of scale_errors for square scale groups of ``columns`` columns: several rows at once."""
    columns = triton.next_power_of_2(min(columns, 128))
    return {"ROWS": 1024 // columns, "COLUMNS": columns}


def new_results(columns: int, rows: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Memory for the values and the errors of a block."""
    values = torch.empty(columns, rows, dtype=torch.float16, device=device)
    return values, torch.empty(columns, rows, dtype=torch.float32, device=device)


@functools.lru_cache(maxsize=256)
def _prepare_rounding(
    columns: int,
    rows: int,
    group_rows: int,
    scale_column_stride: int,
    element: ElementArithmetic,
    levels: int,
    has_before: bool,
    aligned: bool,
    device: torch.device,
) -> Callable[..., None]:
    """The launch of round_block for blocks of one shape, with all arguments but the tensors: GPTQ makes hundreds of equal ones."""
    config, warps = CONFIGS["round_block"]
    constants = {"HAS_BEFORE": has_before, "LEVELS": levels, **element_constants(element), **config}
    grid = (triton.cdiv(rows, config["ROWS"]),)
    run = Launcher(_round_block, grid, constants, device, keep=aligned, num_warps=warps)
    return lambda *tensors: run(*tensors, columns, rows, group_rows, scale_column_stride, rows)


def round_block(weight, shift, before, coupling, scale, group_rows, element, codes=None, level_scale=None, *, out=None):
    """See :func:`..reference.rounding.round_block`; for up to :data:`MAX_COLUMNS` columns."""
    columns, rows = weight.shape
    values, errors = out or new_results(columns, rows, weight.device)
    tensors = [
        weight.contiguous(),
        shift.contiguous(),
        shift if before is None else before.contiguous(),
        coupling.contiguous(),
        scale.contiguous(),
        scale if codes is None else codes,
        scale if level_scale is None else level_scale.contiguous(),
        values,
        errors,
    ]
    run = _prepare_rounding(
        columns,
        rows,
        min(group_rows, rows),
        scale.shape[1] if scale.shape[0] > 1 else 0,
        element,
        0 if codes is None else len(codes),
        before is not None,
        functools.reduce(operator.or_, (tensor.data_ptr() for tensor in tensors)) % 16 == 0,
        weight.device,
    )
    run(*tensors)
    return values, errors


def scale_errors(weight, scale, ratios, column_weight, group_rows, group_columns, sum_rows, element):
    """See :func:`..reference.rounding.scale_errors`."""
    weight = weight if weight.stride(1) == 1 else weight.contiguous()
    out, inner = weight.shape
    sums, groups = triton.cdiv(out, sum_rows), scale.shape[1]
    errors = torch.empty(len(ratios), sums, groups, dtype=torch.float32, device=weight.device)
    constants, warps = CONFIGS["scale_errors"]
    if sum_rows > 1:
        constants = square_group_config(group_columns)
    _scale_errors[(sums, groups)](
        weight,
        scale.contiguous(),
        ratios,
        ratios if column_weight is None else column_weight,
        errors,
        out,
        inner,
        weight.stride(0),
        len(ratios),
        group_rows,
        group_columns,
        groups,
        sum_rows,
        sums,
        HAS_WEIGHT=column_weight is not None,
        **element_constants(element),
        **constants,
        CANDIDATES=triton.next_power_of_2(len(ratios)),
        num_warps=warps,
    )
    return errors


def level_groups_config(columns: int) -> dict[str, int]:
    """Configuration of search_level_scales for groups of ``columns`` columns: several groups at once."""
    return {"COLUMNS": columns, "GROUPS": CONFIGS["search_level_scales"][0]["WEIGHTS"] // columns}


def search_level_scales(values, bits, codes, column_weight, steps, largest):
    """See :func:`..reference.rounding.search_level_scales`."""
    values = values if values.stride(1) == 1 else values.contiguous()
    rows, groups = bits.shape
    best = torch.empty_like(bits, memory_format=torch.contiguous_format)
    errors = torch.empty(2, rows, groups, dtype=torch.float32, device=values.device)
    config = level_groups_config(values.shape[1] // groups)
    _search_level_scales[(rows, triton.cdiv(groups, config["GROUPS"]))](
        values,
        bits.contiguous(),
        codes,
        codes if column_weight is None else column_weight,
        best,
        errors,
        groups,
        values.stride(0),
        rows * groups,
        steps,
        HAS_WEIGHT=column_weight is not None,
        LEVELS=len(codes),
        LARGEST=largest,
        **config,
        num_warps=CONFIGS["search_level_scales"][1],
    )
    return best, errors
