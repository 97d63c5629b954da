"""Quantize activations and weights to 8 bits, and dequantize weights, in Triton. The kernels are memory-bound.

The absolute maximum of a scale group is computed on the bits of the floats as integers, where NaN > Inf > every finite
value. The scale of a group that contains NaN or Inf is therefore NaN or Inf.
"""

import torch
import triton
import triton.language as tl

from ..reference import LARGEST, SMALLEST_AMAX
from .launcher import Launcher

__all__ = [
    "CONFIGS",
    "MAGIC",
    "SEPARATE",
    "as_bits",
    "dequantize_weight",
    "prepare_quantizer",
    "prepare_static_quantizer",
    "quantize_weight",
]

# No fused multiply-add: every operation is rounded as in plain torch, and the quantized values are bit-identical.
SEPARATE = {"enable_fp_fusion": False}
# Shipped launch configurations: kernel name → (constexpr values, warps).
CONFIGS = {
    "quantize_blocks": ({"ROWS": 8, "COLUMNS": 512}, 4),
    "quantize_static": ({"VALUES": 4096}, 4),
    "quantize_square_blocks": ({"VALUES": 4096}, 4),
    "dequantize": ({"ROWS": 8, "COLUMNS": 512}, 4),
}
_SMALLEST = tl.constexpr(SMALLEST_AMAX)
MAGIC = tl.constexpr(12582912.0)  # 1.5·2²³: adding it rounds to an integer in the low mantissa bits


@triton.jit
def magnitude(value):
    """Bits of |value| as an integer: monotonic in |value|, NaN is the largest."""
    return value.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def compute_scale(bits, LARGEST: tl.constexpr):
    """Scale of a group, and its inverse, from the bits of the group's absolute maximum."""
    largest = bits.to(tl.float32, bitcast=True)
    # tl.maximum would drop a NaN.
    largest = tl.where(bits < _SMALLEST_BITS, _SMALLEST, largest)
    return tl.div_rn(largest, tl.zeros_like(largest) + LARGEST), tl.div_rn(tl.zeros_like(largest) + LARGEST, largest)


_SMALLEST_BITS = tl.constexpr((127 - 100) << 23)


@triton.jit
def encode_e4m3(value):
    """Round |value| ≤ 448 to float8_e4m3fn, ties to even, by integer arithmetic; returns uint8 bits. Below SM 8.9."""
    bits = value.to(tl.int32, bitcast=True)
    sign = (bits >> 24) & 0x80
    bits = bits & 0x7FFFFFFF
    # Normal: drop 20 of 23 mantissa bits, rounding half to even; the exponent bias changes from 127 to 7.
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - ((127 - 7) << 3)
    # Subnormal: multiples of 2⁻⁹.
    small = (bits.to(tl.float32, bitcast=True) * 512.0 + MAGIC).to(tl.int32, bitcast=True) & 0xF
    return (tl.where(bits < ((127 - 6) << 23), small, normal) | sign).to(tl.uint8)


@triton.jit
def decode_e4m3(bits):
    """Convert the bits of a finite float8_e4m3fn to float16, exactly, by integer arithmetic."""
    bits = bits.to(tl.int16)
    half = ((bits & 0x80) << 8) | ((bits & 0x7F) << 7)
    return half.to(tl.float16, bitcast=True) * 256.0


@triton.jit
def encode(value, inverse, INTEGER: tl.constexpr, NATIVE: tl.constexpr):
    """Quantize values to int8, or to float8_e4m3fn as uint8 bits. No |value| exceeds the maximum that the scale maps."""
    scaled = value * inverse
    if INTEGER:
        quantized = (scaled + MAGIC).to(tl.int32, bitcast=True).to(tl.int8)
    elif NATIVE:
        quantized = scaled.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    else:
        quantized = encode_e4m3(scaled)
    return quantized


@triton.jit
def _apply_hadamard(value, ORDER: tl.constexpr):
    """Multiply groups of ORDER (4 or 16) rows of a (16, n) tile by the regular Hadamard matrix; returns float32.

    An entry ±1/√ORDER is negative if the number of base-4 digit positions where row and column add up to three is odd.
    Products of 16-bit floats with the entries are exact; a float32 is split into two bfloat16.
    """
    both = tl.arange(0, 16)[:, None] ^ tl.arange(0, 16)[None, :]
    threes = both & (both >> 1)
    matrix = tl.where(both < ORDER, 1 - 2 * ((threes ^ (threes >> 2)) & 1), 0).to(tl.float32) / (2 if ORDER == 4 else 4)
    if value.dtype == tl.float32:
        bits = value.to(tl.int32, bitcast=True)
        high = (bits >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
        low = (value - (bits & -65536).to(tl.float32, bitcast=True)).to(tl.bfloat16)
        matrix = matrix.to(tl.bfloat16)
        rotated = tl.dot(matrix, high, tl.dot(matrix, low))
    else:
        rotated = tl.dot(matrix.to(value.dtype), value)
    return rotated


@triton.jit
def rotate(value, SIZE: tl.constexpr, GROUP: tl.constexpr):
    """Multiply groups of GROUP adjacent values of a flat tile by the regular Hadamard matrix; returns float32.

    Two tensor core products: H₂₅₆ = H₁₆⊗H₁₆, H₆₄ = H₄⊗H₁₆. Butterfly sums on CUDA cores are bound by data exchange
    between threads.
    """
    value = _apply_hadamard(tl.trans(tl.reshape(value, [SIZE // 16, 16])), 16)
    if GROUP == 16:
        value = tl.trans(value)
    else:
        ORDER: tl.constexpr = GROUP // 16
        value = tl.trans(tl.reshape(value, [16, SIZE // GROUP, ORDER]), 1, 0, 2)  # group, index in 16, index of the 16
        value = _apply_hadamard(tl.trans(tl.reshape(value, [SIZE // 16, 16])), ORDER)
        value = tl.trans(tl.reshape(tl.trans(value), [SIZE // GROUP, 16, ORDER]), 0, 2, 1)
    return tl.reshape(value, [SIZE])


@triton.jit
def _quantize_blocks(
    x,
    qdata,
    scale,
    rows,
    columns,
    x_stride,
    scale_stride,
    WIDTH: tl.constexpr,
    LARGEST: tl.constexpr,
    INTEGER: tl.constexpr,
    NATIVE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    value = tl.load(x + row.to(tl.int64)[:, None] * x_stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
    blocks = tl.reshape(value, [ROWS, COLUMNS // WIDTH, WIDTH])
    step, inverse = compute_scale(tl.max(magnitude(blocks), axis=2), LARGEST)
    quantized = encode(blocks, inverse[:, :, None], INTEGER, NATIVE)
    tl.store(
        qdata + row.to(tl.int64)[:, None] * columns + column[None, :],
        tl.reshape(quantized, [ROWS, COLUMNS]),
        mask=inside,
    )
    block = tl.program_id(1) * (COLUMNS // WIDTH) + tl.arange(0, COLUMNS // WIDTH)
    pointers = scale + block.to(tl.int64)[None, :] * scale_stride + row[:, None]
    tl.store(pointers, step, mask=(row < rows)[:, None] & (block * WIDTH < columns)[None, :])


@triton.jit
def _load_row_part(x, left, columns, COLUMNS: tl.constexpr, GROUP: tl.constexpr):
    column = left + tl.arange(0, COLUMNS)
    value = tl.load(x + column, mask=column < columns, other=0.0)
    if GROUP:
        value = rotate(value, COLUMNS, GROUP)
    return value.to(tl.float32)


@triton.jit
def _quantize_rows(
    x,
    qdata,
    scale,
    columns,
    x_stride,
    LARGEST: tl.constexpr,
    INTEGER: tl.constexpr,
    NATIVE: tl.constexpr,
    GROUP: tl.constexpr,
    COLUMNS: tl.constexpr,
    WHOLE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    x += row * x_stride
    qdata += row * columns
    column = tl.arange(0, COLUMNS)
    if WHOLE:  # one program holds the whole row
        value = _load_row_part(x, 0, columns, COLUMNS, GROUP)
        step, inverse = compute_scale(tl.max(magnitude(value), axis=0), LARGEST)
        tl.store(qdata + column, encode(value, inverse, INTEGER, NATIVE), mask=column < columns)
    else:
        bits = tl.zeros([COLUMNS], tl.int32)
        for left in range(0, columns, COLUMNS):
            bits = tl.maximum(bits, magnitude(_load_row_part(x, left, columns, COLUMNS, GROUP)))
        step, inverse = compute_scale(tl.max(bits, axis=0), LARGEST)
        for left in range(0, columns, COLUMNS):
            quantized = encode(_load_row_part(x, left, columns, COLUMNS, GROUP), inverse, INTEGER, NATIVE)
            tl.store(qdata + left + column, quantized, mask=left + column < columns)
    tl.store(scale + row, step)


@triton.jit
def _quantize_static(x, qdata, scale, count, LARGEST: tl.constexpr, NATIVE: tl.constexpr, VALUES: tl.constexpr):
    index = tl.program_id(0).to(tl.int64) * VALUES + tl.arange(0, VALUES)
    value = tl.load(x + index, mask=index < count, other=0.0).to(tl.float32) * (1.0 / tl.load(scale))
    # Comparisons leave NaN as it is; tl.clamp would not.
    value = tl.where(value > LARGEST, LARGEST, tl.where(value < -LARGEST, -LARGEST, value))
    quantized = tl.where(value == value, encode(value, 1.0, False, NATIVE), 0x7F)  # 0x7F is NaN
    tl.store(qdata + index, quantized.to(tl.uint8), mask=index < count)


@triton.jit
def _quantize_square_blocks(
    weight,
    qdata,
    scale,
    rows,
    columns,
    stride,
    blocks,
    SIZE: tl.constexpr,
    LARGEST: tl.constexpr,
    INTEGER: tl.constexpr,
    NATIVE: tl.constexpr,
    ROWS: tl.constexpr,
):
    top, left = tl.program_id(0) * SIZE, tl.program_id(1) * SIZE
    column = left + tl.arange(0, SIZE)
    bits = tl.zeros([ROWS, SIZE], tl.int32)
    for start in range(0, SIZE, ROWS):
        row = (top + start + tl.arange(0, ROWS)).to(tl.int64)
        inside = (row < rows)[:, None] & (column < columns)[None, :]
        value = tl.load(weight + row[:, None] * stride + column[None, :], mask=inside, other=0.0)
        bits = tl.maximum(bits, magnitude(value.to(tl.float32)))
    step, inverse = compute_scale(tl.max(tl.max(bits, axis=1), axis=0), LARGEST)
    tl.store(scale + tl.program_id(0) * blocks + tl.program_id(1), step)
    for start in range(0, SIZE, ROWS):
        row = (top + start + tl.arange(0, ROWS)).to(tl.int64)
        inside = (row < rows)[:, None] & (column < columns)[None, :]
        value = tl.load(weight + row[:, None] * stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
        pointers = qdata + row[:, None] * columns + column[None, :]
        tl.store(pointers, encode(value, inverse, INTEGER, NATIVE), mask=inside)


@triton.jit
def _dequantize(
    qdata,
    scale,
    weight,
    rows,
    columns,
    scale_stride,
    row_scaled,
    INTEGER: tl.constexpr,
    NATIVE: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    quantized = tl.load(qdata + row[:, None] * columns + column[None, :], mask=inside, other=0)
    if INTEGER:
        value = quantized.to(tl.float16 if GROUP else tl.float32)  # both are exact
    elif NATIVE:
        value = quantized.to(tl.float8e4nv, bitcast=True).to(tl.float16)
    else:
        value = decode_e4m3(quantized)
    if GROUP:  # before scaling: the products of the rotation are exact
        value = tl.reshape(rotate(tl.reshape(value, [ROWS * COLUMNS]), ROWS * COLUMNS, GROUP), [ROWS, COLUMNS])
    value = value.to(tl.float32)
    if BLOCK:
        block = tl.program_id(1) * (COLUMNS // BLOCK) + tl.arange(0, COLUMNS // BLOCK)
        has_scale = (row < rows)[:, None] & (block * BLOCK < columns)[None, :]
        step = tl.load(scale + (row // BLOCK)[:, None] * scale_stride + block[None, :], mask=has_scale, other=0.0)
        value = tl.reshape(tl.reshape(value, [ROWS, COLUMNS // BLOCK, BLOCK]) * step[:, :, None], [ROWS, COLUMNS])
    else:
        value *= tl.load(scale + row * row_scaled, mask=row < rows, other=0.0)[:, None]
    tl.store(weight + row[:, None] * columns + column[None, :], value.to(weight.dtype.element_ty), mask=inside)


def format_constants(dtype: torch.dtype, device: torch.device) -> dict[str, object]:
    """Constexpr values of an element format; NATIVE if the GPU has conversion instructions for float8_e4m3fn."""
    native = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)
    return {"LARGEST": LARGEST[dtype], "INTEGER": dtype is torch.int8, "NATIVE": native}


def as_bits(qdata: torch.Tensor) -> torch.Tensor:
    """View quantized values or scales as kernels expect them: float8_e4m3fn as uint8, other dtypes unchanged."""
    return qdata.view(torch.uint8) if qdata.dtype is torch.float8_e4m3fn else qdata


def _with_contiguous_rows(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(1) == 1 else x.contiguous()


def blocks_config(width: int) -> dict[str, int]:
    """Configuration of quantize_blocks for a block width: whole blocks, the shipped number of values per program."""
    config = CONFIGS["quantize_blocks"][0]
    columns = max(config["COLUMNS"], width)
    return {"ROWS": max(config["ROWS"] * config["COLUMNS"] // columns, 1), "COLUMNS": columns, "WIDTH": width}


def square_blocks_config(size: int) -> dict[str, int]:
    """Configuration of quantize_square_blocks for a block size: the shipped number of values per step."""
    return {"ROWS": min(CONFIGS["quantize_square_blocks"][0]["VALUES"] // size, size), "SIZE": size}


def dequantize_config(block_size: int) -> dict[str, int]:
    """Configuration of dequantize for a block size (0 for none): whole blocks, the shipped number of values."""
    config = CONFIGS["dequantize"][0]
    columns = max(config["COLUMNS"], block_size)
    return {"ROWS": max(config["ROWS"] * config["COLUMNS"] // columns, 1), "COLUMNS": columns}


def rows_config(columns: int, group: int) -> tuple[dict[str, object], int]:
    """Configuration and warps of quantize_rows for rows of ``columns`` values, rotated in groups of ``group`` (0: none)."""
    columns = max(triton.next_power_of_2(columns), 256)
    # The rotation exchanges values through shared memory: 99 KB on SM 8.6 and 8.9.
    if columns <= (16384 if group else 32768):
        return {"COLUMNS": columns, "WHOLE": True}, max(columns // (4096 if group else 2048), 1)
    return {"COLUMNS": 2048, "WHOLE": False}, 4


def prepare_quantizer(x: torch.Tensor, dtype: torch.dtype, block_size: int, rotate_by: int, keep: bool = True):
    """Prepare the quantization of activations with the shape, dtype, row stride and alignment of ``x``.

    Args:
        x: (M, K).
        dtype, block_size, rotate_by: see :func:`..reference.quantize.quantize_inputs`.
        keep: see :class:`Launcher`.

    Returns:
        Function of activations: quantized values (M, K) of ``dtype`` and scale float32 (⌈K/block_size⌉ or 1, M).
    """
    device, (rows, columns) = x.device, x.shape
    stride = x.stride(0) if x.stride(1) == 1 else columns
    groups = triton.cdiv(columns, block_size) if block_size else 1
    constants = format_constants(dtype, device)
    if block_size:
        config, warps = blocks_config(block_size), CONFIGS["quantize_blocks"][1]
        grid = (triton.cdiv(rows, config["ROWS"]), triton.cdiv(columns, config["COLUMNS"]))
        kernel, sizes = _quantize_blocks, (rows, columns, stride, rows)
    else:
        constants = {**constants, "GROUP": rotate_by}
        config, warps = rows_config(columns, rotate_by)
        grid, kernel, sizes = (rows,), _quantize_rows, (columns, stride)
    launch = Launcher(kernel, grid, {**constants, **config}, device, keep=keep, num_warps=warps, **SEPARATE)

    def quantize(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        qdata = torch.empty((rows, columns), dtype=dtype, device=device)
        scale = torch.empty((groups, rows), dtype=torch.float32, device=device)
        launch(x if x.stride(1) == 1 else x.contiguous(), as_bits(qdata), scale, *sizes)
        return qdata, scale

    return quantize


def prepare_static_quantizer(x: torch.Tensor, keep: bool = True):
    """Prepare the quantization to float8_e4m3fn of contiguous activations as ``x``, with one given scale.

    Returns:
        Function of activations and of their scale, float32 with one value: float8_e4m3fn of the shape of ``x``. Values
        beyond ±448 times the scale are clamped.
    """
    shape, device, count = x.shape, x.device, x.numel()
    config, warps = CONFIGS["quantize_static"]
    constants = format_constants(torch.float8_e4m3fn, device)
    del constants["INTEGER"]
    grid = (triton.cdiv(count, config["VALUES"]),)
    launch = Launcher(_quantize_static, grid, {**constants, **config}, device, keep=keep, num_warps=warps)

    def quantize(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        qdata = torch.empty(shape, dtype=torch.float8_e4m3fn, device=device)
        launch(x, qdata.view(torch.uint8), scale, count)
        return qdata

    return quantize


def quantize_weight(weight: torch.Tensor, dtype: torch.dtype, block_size: int):
    """See :func:`..reference.quantize.quantize_weight`."""
    if not block_size:
        qdata, scale = prepare_quantizer(weight, dtype, 0, 0)(weight)
        return qdata, scale.reshape(-1)[:, None]
    weight = _with_contiguous_rows(weight)
    rows, columns = weight.shape
    counts = triton.cdiv(rows, block_size), triton.cdiv(columns, block_size)
    qdata = torch.empty(rows, columns, dtype=dtype, device=weight.device)
    scale = torch.empty(counts, dtype=torch.float32, device=weight.device)
    _quantize_square_blocks[counts](
        weight,
        as_bits(qdata),
        scale,
        rows,
        columns,
        weight.stride(0),
        counts[1],
        **format_constants(dtype, weight.device),
        **square_blocks_config(block_size),
        num_warps=CONFIGS["quantize_square_blocks"][1],
        **SEPARATE,
    )
    return qdata, scale


def dequantize_weight(qdata: torch.Tensor, scale: torch.Tensor, block_size: int, rotate_by: int, dtype: torch.dtype):
    """See :func:`..reference.quantize.dequantize_weight`."""
    qdata, scale = qdata.contiguous(), scale.float().contiguous()
    rows, columns = qdata.shape
    weight = torch.empty(rows, columns, dtype=dtype, device=qdata.device)
    config, warps = dequantize_config(block_size), CONFIGS["dequantize"][1]
    constants = format_constants(qdata.dtype, qdata.device)
    _dequantize[(triton.cdiv(rows, config["ROWS"]), triton.cdiv(columns, config["COLUMNS"]))](
        as_bits(qdata),
        scale,
        weight,
        rows,
        columns,
        scale.stride(0),
        int(scale.numel() > 1),
        INTEGER=constants["INTEGER"],
        NATIVE=constants["NATIVE"],
        BLOCK=block_size,
        GROUP=rotate_by,
        **config,
        num_warps=warps,
    )
    return weight
