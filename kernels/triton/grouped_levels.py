"""Linear layers with W4A8 weights in Triton: 4-bit indices of levels, scaled per group to the INT8 values that are multiplied.

The INT8 values of the 16 levels of a group are computed once and kept in four registers, from which one instruction selects
four values by their indices (PTX ``prmt``). For many tokens the weight is expanded to INT8 in memory first. For few tokens one
kernel expands and multiplies on CUDA cores (``dp4a``), because reading the weight takes most of the time.
"""

import os
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .launcher import Launcher
from .linear import Operands, prepare_product, shipped_launch
from .quantize import MAGIC, SEPARATE, as_bits, decode_e4m3, prepare_quantizer

__all__ = ["EXPAND", "FEW_TOKENS", "FewTokens", "expand_weight", "prepare_w4a8_linear"]

UNIT = 16  # columns that a thread expands at once
EXPAND = ({"UNITS": 512}, 4)  # constexpr values and warps of the expansion
_LARGEST = tl.constexpr(127.0)
# Triton's interpreter does not run PTX.
_PTX = os.environ.get("TRITON_INTERPRET") != "1"


class FewTokens(NamedTuple):
    """Launch configuration of the product with few tokens.

    Attributes:
        columns: output channels per program.
        units: units of 16 input channels per step.
        warps: warps per program.
    """

    columns: int
    units: int
    warps: int


# Padded number of tokens → shipped launch, measured on an H200. For more tokens the weight is expanded in memory first.
FEW_TOKENS = {1: FewTokens(4, 64, 4), 2: FewTokens(4, 64, 4), 4: FewTokens(8, 32, 4)}
_PROGRAMS = 4  # per multiprocessor, which the input channels are split for
_MOST_SPLITS = 16


@triton.jit
def _select_bytes(low, high, selector, PTX: tl.constexpr):
    """Four of the eight bytes of two int32, by the numbers 0…7 in the low four digits of ``selector``."""
    if PTX:
        selected = tl.inline_asm_elementwise(
            "prmt.b32 $0, $1, $2, $3;", "=r,r,r,r", [low, high, selector], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        both = (high.to(tl.int64) << 32) | (low.to(tl.int64) & 0xFFFFFFFF)
        selected = tl.zeros_like(low)
        for i in tl.static_range(4):
            shift = ((selector >> (4 * i)) & 7).to(tl.int64) * 8
            selected |= ((both >> shift) & 255).to(tl.int32) << (8 * i)
    return selected


@triton.jit
def _multiply_bytes(a, b, total, PTX: tl.constexpr):
    """Add the products of the four int8 in two int32 to ``total``."""
    if PTX:
        total = tl.inline_asm_elementwise(
            "dp4a.s32.s32 $0, $1, $2, $3;", "=r,r,r,r", [a, b, total], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        for i in tl.static_range(4):
            total += ((a << (24 - 8 * i)) >> 24) * ((b << (24 - 8 * i)) >> 24)
    return total


@triton.jit
def _load_scale(scale, at, inside, E4M3: tl.constexpr):
    """Group scales as float32."""
    value = tl.load(scale + at, mask=inside, other=0)
    if E4M3:
        value = decode_e4m3(value).to(tl.float32)
    return value


@triton.jit
def _scale_level(codebook, index: tl.constexpr, scale, HAS_CODEBOOK: tl.constexpr, CLAMP: tl.constexpr):
    """Round a level times its scale to an integer, in the low byte of an int32."""
    level = tl.load(codebook + index) if HAS_CODEBOOK else index - 8.0
    value = level * scale
    if CLAMP:
        value = tl.minimum(tl.maximum(value, -_LARGEST), _LARGEST)
    return (value + MAGIC).to(tl.int32, bitcast=True)


@triton.jit
def _scale_levels(
    codebook, first: tl.constexpr, scale, HAS_CODEBOOK: tl.constexpr, CLAMP: tl.constexpr, PTX: tl.constexpr
):
    """The scaled levels ``first``…``first + 3`` as the bytes of an int32."""
    a = _scale_level(codebook, first, scale, HAS_CODEBOOK, CLAMP)
    b = _scale_level(codebook, first + 1, scale, HAS_CODEBOOK, CLAMP)
    c = _scale_level(codebook, first + 2, scale, HAS_CODEBOOK, CLAMP)
    d = _scale_level(codebook, first + 3, scale, HAS_CODEBOOK, CLAMP)
    zero = tl.zeros_like(a)
    return _select_bytes(
        _select_bytes(a, b, zero + 0x0040, PTX), _select_bytes(c, d, zero + 0x0040, PTX), zero + 0x5410, PTX
    )


@triton.jit
def _expand_unit(indices, codebook, scale, HAS_CODEBOOK: tl.constexpr, CLAMP: tl.constexpr, PTX: tl.constexpr):
    """INT8 values of 16 columns, the bytes of four int32; ``indices``: int64 with 16 of four bits, the first one lowest."""
    levels_0 = _scale_levels(codebook, 0, scale, HAS_CODEBOOK, CLAMP, PTX)
    levels_4 = _scale_levels(codebook, 4, scale, HAS_CODEBOOK, CLAMP, PTX)
    levels_8 = _scale_levels(codebook, 8, scale, HAS_CODEBOOK, CLAMP, PTX)
    levels_12 = _scale_levels(codebook, 12, scale, HAS_CODEBOOK, CLAMP, PTX)
    first = _look_up(indices.to(tl.int32), levels_0, levels_4, levels_8, levels_12, PTX)
    second = _look_up((indices >> 32).to(tl.int32), levels_0, levels_4, levels_8, levels_12, PTX)
    return first[0], first[1], second[0], second[1]


@triton.jit
def _look_up(indices, levels_0, levels_4, levels_8, levels_12, PTX: tl.constexpr):
    """The values of eight indices, the bytes of two int32: those of the lower and of the upper levels, then one of both."""
    within = indices & 0x77777777
    half = ((indices >> 1) & 0x44444444) | 0x32103210
    low = _select_bytes(levels_0, levels_4, within, PTX)
    high = _select_bytes(levels_8, levels_12, within, PTX)
    first = _select_bytes(low, high, half, PTX)
    within, half = within >> 16, half >> 16
    low = _select_bytes(levels_0, levels_4, within, PTX)
    high = _select_bytes(levels_8, levels_12, within, PTX)
    return first, _select_bytes(low, high, half, PTX)


@triton.jit
def _store_unit(values, unit, inside, indices, codebook, scale, HAS_CODEBOOK, CLAMP, PTX, UNITS: tl.constexpr):
    a, b, c, d = _expand_unit(indices, codebook, scale, HAS_CODEBOOK, CLAMP, PTX)
    words = tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), [UNITS, 4])
    tl.store(values + unit[:, None] * 4 + tl.arange(0, 4)[None, :], words, mask=inside[:, None])


@triton.jit
def _expand_weight(
    packed, scale, codebook, values, units,
    E4M3: tl.constexpr, HAS_CODEBOOK: tl.constexpr, PER_GROUP: tl.constexpr, PTX: tl.constexpr, UNITS: tl.constexpr,
):  # fmt: skip
    # Rows of the weight need not be told apart: groups are consecutive in every tensor.
    unit = tl.program_id(0).to(tl.int64) * UNITS + tl.arange(0, UNITS)
    inside = unit < units
    indices = tl.load(packed.to(tl.pointer_type(tl.int64)) + unit, mask=inside, other=0)
    factor = _load_scale(scale, unit // PER_GROUP, inside, E4M3)
    words = values.to(tl.pointer_type(tl.int32))
    largest = 8.0
    if HAS_CODEBOOK:
        largest = tl.max(tl.abs(tl.load(codebook + tl.arange(0, 16))), 0)
    if tl.max(factor, 0) * largest > _LARGEST:  # in files of others: clamping takes a third of the time
        _store_unit(words, unit, inside, indices, codebook, factor, HAS_CODEBOOK, True, PTX, UNITS)
    else:
        _store_unit(words, unit, inside, indices, codebook, factor, HAS_CODEBOOK, False, PTX, UNITS)


@triton.jit
def _multiply_few_tokens(
    x, packed, out, group_scale, codebook, bias, input_scale, scale, sums, arrived,
    rows, columns, units, steps,
    E4M3: tl.constexpr, HAS_CODEBOOK: tl.constexpr, PER_GROUP: tl.constexpr, PTX: tl.constexpr, HAS_BIAS: tl.constexpr,
    SPLITS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, UNITS: tl.constexpr,
):  # fmt: skip
    tile, split = tl.program_id(0), tl.program_id(1)
    row, column = tl.arange(0, ROWS), tile * COLUMNS + tl.arange(0, COLUMNS)
    near_row, near_column = tl.minimum(row, rows - 1), tl.minimum(column, columns - 1).to(tl.int64)
    packed, x = packed.to(tl.pointer_type(tl.int64)), x.to(tl.pointer_type(tl.int64))
    total = tl.zeros([ROWS, COLUMNS, UNITS], tl.int32)
    for step in range(split * steps, (split + 1) * steps):
        unit = step * UNITS + tl.arange(0, UNITS)
        inside = unit < units
        indices = tl.load(packed + near_column[:, None] * units + unit[None, :], mask=inside[None, :], other=0)
        at = near_column[:, None] * (units // PER_GROUP) + unit[None, :] // PER_GROUP
        factor = _load_scale(group_scale, at, inside[None, :], E4M3)
        a, b, c, d = _expand_unit(indices, codebook, factor, HAS_CODEBOOK, True, PTX)
        inputs = x + near_row[:, None] * (2 * units) + 2 * unit[None, :]
        first = tl.load(inputs, mask=inside[None, :], other=0)[:, None, :]
        second = tl.load(inputs + 1, mask=inside[None, :], other=0)[:, None, :]
        total = _multiply_bytes(a[None, :, :], first.to(tl.int32), total, PTX)
        total = _multiply_bytes(b[None, :, :], (first >> 32).to(tl.int32), total, PTX)
        total = _multiply_bytes(c[None, :, :], second.to(tl.int32), total, PTX)
        total = _multiply_bytes(d[None, :, :], (second >> 32).to(tl.int32), total, PTX)
    sum = tl.sum(total, 2)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    at = row[:, None] * columns + column[None, :]
    last = SPLITS == 1
    if SPLITS > 1:
        # Sums of integers do not depend on the order. The last program to arrive scales them.
        tl.atomic_add(sums + at, sum, mask=inside, sem="relaxed")
        tl.debug_barrier()
        last = tl.atomic_add(arrived + tile, 1) == SPLITS - 1
    if last:
        if SPLITS > 1:
            sum = tl.load(sums + at, mask=inside, other=0, cache_modifier=".cg")
        value = sum.to(tl.float32) * tl.load(input_scale + near_row)[:, None] * tl.load(scale + near_column)[None, :]
        if HAS_BIAS:
            value += tl.load(bias + near_column).to(tl.float32)[None, :]
        tl.store(out + at, value.to(out.dtype.element_ty), mask=inside)


def _constants(qdata: torch.Tensor, group_scale: torch.Tensor, codebook: torch.Tensor | None) -> dict[str, object]:
    """Values of the constexpr parameters that both kernels have."""
    return {
        "E4M3": group_scale.dtype is not torch.float32,
        "HAS_CODEBOOK": codebook is not None,
        "PER_GROUP": 2 * qdata.numel() // (UNIT * group_scale.numel()),
        "PTX": _PTX,
    }


def _prepare_expansion(qdata, group_scale, codebook, keep: bool):
    """Prepare the expansion of weights with the shapes, dtypes and alignment of the arguments; returns a function of them."""
    (out, packed), device, units = qdata.shape, qdata.device, 2 * qdata.numel() // UNIT
    config, warps = EXPAND
    constants = {**_constants(qdata, group_scale, codebook), **config}
    grid = (triton.cdiv(units, config["UNITS"]),)
    run = Launcher(_expand_weight, grid, constants, device, keep=keep, num_warps=warps, **SEPARATE)

    def expand(qdata, group_scale, codebook) -> torch.Tensor:
        values = torch.empty((out, 2 * packed), dtype=torch.int8, device=device)
        scale = as_bits(group_scale)
        run(qdata, scale, scale if codebook is None else codebook, values, units)
        return values

    return expand


def expand_weight(qdata: torch.Tensor, group_scale: torch.Tensor, codebook: torch.Tensor | None) -> torch.Tensor:
    """See :func:`..reference.grouped_levels.expand_weight`."""
    qdata = qdata.contiguous()
    qdata = qdata.clone() if qdata.data_ptr() % 8 else qdata
    arguments = qdata, group_scale.contiguous(), codebook if codebook is None else codebook.contiguous()
    return _prepare_expansion(*arguments, keep=False)(*arguments)


def _count_splits(launch: FewTokens, columns: int, units: int, processors: int) -> int:
    """In how many parts the input channels are split, so that all multiprocessors have programs; a power of two."""
    tiles, steps = triton.cdiv(columns, launch.columns), triton.cdiv(units, launch.units)
    splits = 1
    while splits < _MOST_SPLITS and 2 * splits <= steps and tiles * splits < _PROGRAMS * processors:
        splits *= 2
    return splits


def _prepare_few(tensors, quantized, out_dtype: torch.dtype, launch: FewTokens, keep: bool):
    """Prepare the product with few tokens; returns a function of such tensors and quantized activations."""
    qdata, group_scale, _, codebook, bias = tensors
    (columns, packed), device, rows = qdata.shape, qdata.device, quantized[0].shape[0]
    units = 2 * packed // UNIT
    splits = _count_splits(launch, columns, units, torch.cuda.get_device_properties(device).multi_processor_count)
    tiles, steps = triton.cdiv(columns, launch.columns), triton.cdiv(units, launch.units * splits)
    constants = _constants(qdata, group_scale, codebook) | {
        "HAS_BIAS": bias is not None,
        "SPLITS": splits,
        "ROWS": triton.next_power_of_2(rows),
        "COLUMNS": launch.columns,
        "UNITS": launch.units,
    }
    sizes = rows, columns, units, steps
    run = Launcher(
        _multiply_few_tokens, (tiles, splits), constants, device, keep=keep, num_warps=launch.warps, **SEPARATE
    )

    def multiply(tensors, quantized) -> torch.Tensor:
        qdata, group_scale, scale, codebook, bias = tensors
        x, input_scale = quantized
        out = torch.empty((rows, columns), dtype=out_dtype, device=device)
        sums = arrived = input_scale
        if splits > 1:
            sums = torch.zeros(rows * columns + tiles, dtype=torch.int32, device=device)
            arrived = sums[rows * columns :]
        run(
            x, qdata, out, as_bits(group_scale), scale if codebook is None else codebook,
            scale if bias is None else bias, input_scale, scale, sums, arrived, *sizes,
        )  # fmt: skip
        return out

    return multiply


def prepare_w4a8_linear(
    x, qdata, group_scale, scale, codebook, bias, rotate_by: int, out_dtype: torch.dtype, keep: bool = True
):
    """Prepare :func:`...operators.w4a8_linear` for tensors with the shapes, dtypes and alignment of the arguments.

    Args:
        x: activations (M, K), contiguous.
        qdata: one-byte dtype (N, K/2), contiguous, at an address that is a multiple of 8.
        group_scale: float8_e4m3fn or float32 (N, K/group), contiguous.
        scale: float32 (N,), contiguous.
        codebook: float32 (16,) or None.
        keep: see :class:`.launcher.Launcher`.

    Returns:
        Function of (x, qdata, group_scale, scale, codebook, bias).
    """
    quantize = prepare_quantizer(x, torch.int8, 0, rotate_by, keep)
    quantized = quantize(x)
    launch = FEW_TOKENS.get(triton.next_power_of_2(x.shape[0]))
    if launch is not None:
        multiply = _prepare_few((qdata, group_scale, scale, codebook, bias), quantized, out_dtype, launch, keep)
        return lambda x, *tensors: multiply(tensors, quantize(x))

    expand = _prepare_expansion(qdata, group_scale, codebook, keep)
    operands = Operands(*quantized, expand(qdata, group_scale, codebook), scale, bias)
    product = prepare_product(operands, 0, out_dtype, shipped_launch(operands.x, operands.qdata, 0, False), keep)

    def linear(x, qdata, group_scale, scale, codebook, bias) -> torch.Tensor:
        return product(Operands(*quantize(x), expand(qdata, group_scale, codebook), scale, bias))

    return linear
