"""Quantizing inputs and weights to 8 bits, and back, in Triton. Memory-bound: what counts is bytes in flight.

The largest magnitude of a group is sought among the bits of floats as integers, where NaN > Inf > every number: so a
group that holds either gets a scale that says so.
"""

import torch
import triton
import triton.language as tl

from ..reference import LARGEST, SMALLEST_AMAX

__all__ = ["CONFIGS", "SEPARATE", "dequantize_weight", "quantize_inputs", "quantize_weight"]

# Products and sums are rounded one by one, as plain torch does: the codes are the same to the bit.
SEPARATE = {"enable_fp_fusion": False}
# Shipped launch configurations: kernel name → (constexpr values, warps).
CONFIGS = {
    "quantize_blocks": ({"ROWS": 8, "COLUMNS": 512}, 4),
    "quantize_tiles": ({"VALUES": 4096}, 4),
    "dequantize": ({"ROWS": 8, "COLUMNS": 512}, 4),
}
_SMALLEST = tl.constexpr(SMALLEST_AMAX)
_MAGIC = tl.constexpr(12582912.0)  # 1.5·2²³: adding it rounds to an integer, which then are the low bits


@triton.jit
def magnitude(value):
    """Bits of |value| as an integer that grows with it, NaN the largest."""
    return value.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def code_scales(bits, LARGEST: tl.constexpr):
    """The scale of codes, and its inverse, of a group whose largest magnitude has these bits."""
    largest = bits.to(tl.float32, bitcast=True)
    # Not a maximum: it would drop a NaN.
    largest = tl.where(bits < _SMALLEST_BITS, _SMALLEST, largest)
    return tl.div_rn(largest, tl.zeros_like(largest) + LARGEST), tl.div_rn(tl.zeros_like(largest) + LARGEST, largest)


_SMALLEST_BITS = tl.constexpr((127 - 100) << 23)


@triton.jit
def encode_e4m3(value):
    """Bits of the nearest float8_e4m3fn of |value| ≤ 448, ties to even, by integer arithmetic: for cards without it."""
    bits = value.to(tl.int32, bitcast=True)
    sign = (bits >> 24) & 0x80
    bits = bits & 0x7FFFFFFF
    # Normal: drop 20 of 23 mantissa bits, rounding half to even; the exponent's bias goes from 127 to 7.
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - ((127 - 7) << 3)
    # Subnormal: multiples of 2⁻⁹.
    small = (bits.to(tl.float32, bitcast=True) * 512.0 + _MAGIC).to(tl.int32, bitcast=True) & 0xF
    return (tl.where(bits < ((127 - 6) << 23), small, normal) | sign).to(tl.uint8)


@triton.jit
def decode_e4m3(bits):
    """float16 of the bits of a float8_e4m3fn that is a number: exact, by integer arithmetic."""
    bits = bits.to(tl.int16)
    half = ((bits & 0x80) << 8) | ((bits & 0x7F) << 7)
    return half.to(tl.float16, bitcast=True) * 256.0


@triton.jit
def encode(value, inverse, INTEGER: tl.constexpr, NATIVE: tl.constexpr):
    """Codes of values: int8, or the bits of float8_e4m3fn as uint8. No value is beyond the one that the scale is made for."""
    scaled = value * inverse
    if INTEGER:
        code = (scaled + _MAGIC).to(tl.int32, bitcast=True).to(tl.int8)
    elif NATIVE:
        code = scaled.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    else:
        code = encode_e4m3(scaled)
    return code


@triton.jit
def _hadamard_times(value, ORDER: tl.constexpr):
    """The regular Hadamard matrix of an order of 4 or 16 times columns of 16 values, in groups of that order, as float32.

    Its entries ±1/√ORDER are negative where an odd number of base-4 digits of row and column add up to three. Products of
    16-bit floats with them are exact; a float32 counts as two bfloat16.
    """
    both = tl.arange(0, 16)[:, None] ^ tl.arange(0, 16)[None, :]
    threes = both & (both >> 1)
    matrix = tl.where(both < ORDER, 1 - 2 * ((threes ^ (threes >> 2)) & 1), 0).to(tl.float32) / (2 if ORDER == 4 else 4)
    if value.dtype == tl.float32:
        bits = value.to(tl.int32, bitcast=True)
        high = (bits >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
        low = (value - (bits & -65536).to(tl.float32, bitcast=True)).to(tl.bfloat16)
        matrix = matrix.to(tl.bfloat16)
        turned = tl.dot(matrix, high, tl.dot(matrix, low))
    else:
        turned = tl.dot(matrix.to(value.dtype), value)
    return turned


@triton.jit
def rotate(value, SIZE: tl.constexpr, GROUP: tl.constexpr):
    """Groups of GROUP neighbours of a flat tile times the regular Hadamard matrix, as float32.

    Tensor cores do it, in two steps: H₂₅₆ = H₁₆⊗H₁₆, H₆₄ = H₄⊗H₁₆. Adding up in ordinary cores is bound by exchanges
    between threads.
    """
    value = _hadamard_times(tl.trans(tl.reshape(value, [SIZE // 16, 16])), 16)
    if GROUP == 16:
        value = tl.trans(value)
    else:
        ORDER: tl.constexpr = GROUP // 16
        value = tl.trans(tl.reshape(value, [16, SIZE // GROUP, ORDER]), 1, 0, 2)  # group, place in 16, which 16
        value = _hadamard_times(tl.trans(tl.reshape(value, [SIZE // 16, 16])), ORDER)
        value = tl.trans(tl.reshape(tl.trans(value), [SIZE // GROUP, 16, ORDER]), 0, 2, 1)
    return tl.reshape(value, [SIZE])


@triton.jit
def _quantize_blocks(
    x,
    codes,
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
    live = (row < rows)[:, None] & (column < columns)[None, :]
    value = tl.load(x + row.to(tl.int64)[:, None] * x_stride + column[None, :], mask=live, other=0.0).to(tl.float32)
    blocks = tl.reshape(value, [ROWS, COLUMNS // WIDTH, WIDTH])
    step, inverse = code_scales(tl.max(magnitude(blocks), axis=2), LARGEST)
    code = encode(blocks, inverse[:, :, None], INTEGER, NATIVE)
    tl.store(
        codes + row.to(tl.int64)[:, None] * columns + column[None, :], tl.reshape(code, [ROWS, COLUMNS]), mask=live
    )
    block = tl.program_id(1) * (COLUMNS // WIDTH) + tl.arange(0, COLUMNS // WIDTH)
    place = scale + block.to(tl.int64)[None, :] * scale_stride + row[:, None]
    tl.store(place, step, mask=(row < rows)[:, None] & (block * WIDTH < columns)[None, :])


@triton.jit
def _row_part(x, left, columns, COLUMNS: tl.constexpr, GROUP: tl.constexpr):
    column = left + tl.arange(0, COLUMNS)
    value = tl.load(x + column, mask=column < columns, other=0.0)
    if GROUP:
        value = rotate(value, COLUMNS, GROUP)
    return value.to(tl.float32)


@triton.jit
def _quantize_rows(
    x,
    codes,
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
    codes += row * columns
    column = tl.arange(0, COLUMNS)
    if WHOLE:  # a row fits into a program
        value = _row_part(x, 0, columns, COLUMNS, GROUP)
        step, inverse = code_scales(tl.max(magnitude(value), axis=0), LARGEST)
        tl.store(codes + column, encode(value, inverse, INTEGER, NATIVE), mask=column < columns)
    else:
        bits = tl.zeros([COLUMNS], tl.int32)
        for left in range(0, columns, COLUMNS):
            bits = tl.maximum(bits, magnitude(_row_part(x, left, columns, COLUMNS, GROUP)))
        step, inverse = code_scales(tl.max(bits, axis=0), LARGEST)
        for left in range(0, columns, COLUMNS):
            code = encode(_row_part(x, left, columns, COLUMNS, GROUP), inverse, INTEGER, NATIVE)
            tl.store(codes + left + column, code, mask=left + column < columns)
    tl.store(scale + row, step)


@triton.jit
def _quantize_tiles(
    weight,
    codes,
    scale,
    rows,
    columns,
    stride,
    tiles,
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
        live = (row < rows)[:, None] & (column < columns)[None, :]
        value = tl.load(weight + row[:, None] * stride + column[None, :], mask=live, other=0.0)
        bits = tl.maximum(bits, magnitude(value.to(tl.float32)))
    step, inverse = code_scales(tl.max(tl.max(bits, axis=1), axis=0), LARGEST)
    tl.store(scale + tl.program_id(0) * tiles + tl.program_id(1), step)
    for start in range(0, SIZE, ROWS):
        row = (top + start + tl.arange(0, ROWS)).to(tl.int64)
        live = (row < rows)[:, None] & (column < columns)[None, :]
        value = tl.load(weight + row[:, None] * stride + column[None, :], mask=live, other=0.0).to(tl.float32)
        place = codes + row[:, None] * columns + column[None, :]
        tl.store(place, encode(value, inverse, INTEGER, NATIVE), mask=live)


@triton.jit
def _dequantize(
    codes,
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
    live = (row < rows)[:, None] & (column < columns)[None, :]
    code = tl.load(codes + row[:, None] * columns + column[None, :], mask=live, other=0)
    if INTEGER:
        value = code.to(tl.float16 if GROUP else tl.float32)  # which hold every code
    elif NATIVE:
        value = code.to(tl.float8e4nv, bitcast=True).to(tl.float16)
    else:
        value = decode_e4m3(code)
    if GROUP:  # before they are scaled: what is added up is exact
        value = tl.reshape(rotate(tl.reshape(value, [ROWS * COLUMNS]), ROWS * COLUMNS, GROUP), [ROWS, COLUMNS])
    value = value.to(tl.float32)
    if BLOCK:
        block = tl.program_id(1) * (COLUMNS // BLOCK) + tl.arange(0, COLUMNS // BLOCK)
        inside = (row < rows)[:, None] & (block * BLOCK < columns)[None, :]
        step = tl.load(scale + (row // BLOCK)[:, None] * scale_stride + block[None, :], mask=inside, other=0.0)
        value = tl.reshape(tl.reshape(value, [ROWS, COLUMNS // BLOCK, BLOCK]) * step[:, :, None], [ROWS, COLUMNS])
    else:
        value *= tl.load(scale + row * row_scaled, mask=row < rows, other=0.0)[:, None]
    tl.store(weight + row[:, None] * columns + column[None, :], value.to(weight.dtype.element_ty), mask=live)


def grid_of(dtype: torch.dtype, device: torch.device) -> dict[str, object]:
    """Constexpr values of a grid of codes; NATIVE where the card converts to float8_e4m3fn by itself."""
    native = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)
    return {"LARGEST": LARGEST[dtype], "INTEGER": dtype is torch.int8, "NATIVE": native}


def as_stored(codes: torch.Tensor) -> torch.Tensor:
    """Codes as kernels take them: int8, or uint8 for the bits of a float."""
    return codes if codes.dtype is torch.int8 else codes.view(torch.uint8)


def _rows(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(1) == 1 else x.contiguous()


def blocks_config(width: int) -> dict[str, int]:
    """The configuration of quantize_blocks for blocks of that width: whole blocks, as many values as usual."""
    config = CONFIGS["quantize_blocks"][0]
    columns = max(config["COLUMNS"], width)
    return {"ROWS": max(config["ROWS"] * config["COLUMNS"] // columns, 1), "COLUMNS": columns, "WIDTH": width}


def tiles_config(size: int) -> dict[str, int]:
    """The configuration of quantize_tiles for blocks of that size: as many values at a time as usual."""
    return {"ROWS": min(CONFIGS["quantize_tiles"][0]["VALUES"] // size, size), "SIZE": size}


def dequantize_config(block_size: int) -> dict[str, int]:
    """The configuration of dequantize for blocks of that size, or none: whole blocks, as many values as usual."""
    config = CONFIGS["dequantize"][0]
    columns = max(config["COLUMNS"], block_size)
    return {"ROWS": max(config["ROWS"] * config["COLUMNS"] // columns, 1), "COLUMNS": columns}


def rows_config(columns: int, group: int) -> tuple[dict[str, object], int]:
    """The configuration of quantize_rows, and its warps, for rows of that many columns in rotated groups, or in none (0)."""
    columns = max(triton.next_power_of_2(columns), 256)
    if columns <= (
        16384 if group else 32768
    ):  # what is rotated is exchanged through shared memory, of which cards have 99 KB
        return {"COLUMNS": columns, "WHOLE": True}, max(columns // (4096 if group else 2048), 1)
    return {"COLUMNS": 2048, "WHOLE": False}, 4


def quantize_inputs(x: torch.Tensor, dtype: torch.dtype, block_size: int, rotate_by: int):
    """See :func:`...quantize_inputs`."""
    x = _rows(x)
    rows, columns = x.shape
    groups = triton.cdiv(columns, block_size) if block_size else 1
    codes = torch.empty(rows, columns, dtype=dtype, device=x.device)
    scale = torch.empty(groups, rows, dtype=torch.float32, device=x.device)
    numbers, stored = grid_of(dtype, x.device), as_stored(codes)
    if block_size:
        config, warps = blocks_config(block_size), CONFIGS["quantize_blocks"][1]
        grid = (triton.cdiv(rows, config["ROWS"]), triton.cdiv(columns, config["COLUMNS"]))
        _quantize_blocks[grid](
            x, stored, scale, rows, columns, x.stride(0), rows, **numbers, **config, num_warps=warps, **SEPARATE
        )
    else:
        config, warps = rows_config(columns, rotate_by)
        _quantize_rows[(rows,)](
            x, stored, scale, columns, x.stride(0), **numbers, GROUP=rotate_by, **config, num_warps=warps, **SEPARATE
        )
    return codes, scale.t()


def quantize_weight(weight: torch.Tensor, dtype: torch.dtype, block_size: int):
    """See :func:`...quantize_weight`."""
    if not block_size:
        codes, scale = quantize_inputs(weight, dtype, 0, 0)
        return codes, scale.reshape(-1)[:, None]
    weight = _rows(weight)
    rows, columns = weight.shape
    counts = triton.cdiv(rows, block_size), triton.cdiv(columns, block_size)
    codes = torch.empty(rows, columns, dtype=dtype, device=weight.device)
    scale = torch.empty(counts, dtype=torch.float32, device=weight.device)
    _quantize_tiles[counts](
        weight,
        as_stored(codes),
        scale,
        rows,
        columns,
        weight.stride(0),
        counts[1],
        **grid_of(dtype, weight.device),
        **tiles_config(block_size),
        num_warps=CONFIGS["quantize_tiles"][1],
        **SEPARATE,
    )
    return codes, scale


def dequantize_weight(codes: torch.Tensor, scale: torch.Tensor, block_size: int, rotate_by: int, dtype: torch.dtype):
    """See :func:`...dequantize_weight`."""
    codes, scale = codes.contiguous(), scale.float().contiguous()
    rows, columns = codes.shape
    weight = torch.empty(rows, columns, dtype=dtype, device=codes.device)
    config, warps = dequantize_config(block_size), CONFIGS["dequantize"][1]
    numbers = grid_of(codes.dtype, codes.device)
    _dequantize[(triton.cdiv(rows, config["ROWS"]), triton.cdiv(columns, config["COLUMNS"]))](
        as_stored(codes),
        scale,
        weight,
        rows,
        columns,
        scale.stride(0),
        int(scale.numel() > 1),
        INTEGER=numbers["INTEGER"],
        NATIVE=numbers["NATIVE"],
        BLOCK=block_size,
        GROUP=rotate_by,
        **config,
        num_warps=warps,
    )
    return weight
