"""Quantizing inputs and weights to 8 bits, and back, in Triton. Memory-bound: what counts is bytes in flight.

The largest magnitude of a group is sought among the bits of floats as integers, where NaN > Inf > every number: so a
group that holds either gets a scale that says so.
"""

import torch
import triton
import triton.language as tl

from ..reference import LARGEST, SMALLEST_AMAX

__all__ = ["CONFIGS", "dequantize_weight", "quantize_inputs", "quantize_weight"]

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
def encode(value, inverse, LARGEST: tl.constexpr, INTEGER: tl.constexpr, NATIVE: tl.constexpr):
    """Codes of values: int8, or the bits of float8_e4m3fn as uint8."""
    scaled = tl.minimum(tl.maximum(value * inverse, -LARGEST), LARGEST)
    if INTEGER:
        code = (scaled + _MAGIC).to(tl.int32, bitcast=True).to(tl.int8)
    elif NATIVE:
        code = scaled.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    else:
        code = encode_e4m3(scaled)
    return code


@triton.jit
def rotate(value, SIZE: tl.constexpr, GROUP: tl.constexpr):
    """Groups of GROUP neighbours of a flat float32 tile times the regular Hadamard matrix, a base-4 digit at a time.

    H₄ takes x to (Σx)/2 − x reversed, and reversing four is exchanging neighbours and neighbouring pairs.
    """
    span: tl.constexpr = GROUP // 4
    fours = tl.reshape(value, [SIZE // GROUP, 2, 2, span])
    pairs = tl.sum(fours, axis=2, keep_dims=True)
    beside = pairs - fours
    reverse = tl.sum(beside, axis=1, keep_dims=True) - beside
    turned = tl.reshape(tl.sum(pairs, axis=1, keep_dims=True) * 0.5 - reverse, [SIZE])
    if span > 1:
        turned = rotate(turned, SIZE, span)
    return turned


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
    code = encode(blocks, inverse[:, :, None], LARGEST, INTEGER, NATIVE)
    tl.store(codes + row.to(tl.int64)[:, None] * columns + column[None, :], tl.reshape(code, [ROWS, COLUMNS]), mask=live)
    block = tl.program_id(1) * (COLUMNS // WIDTH) + tl.arange(0, COLUMNS // WIDTH)
    place = scale + block.to(tl.int64)[None, :] * scale_stride + row[:, None]
    tl.store(place, step, mask=(row < rows)[:, None] & (block * WIDTH < columns)[None, :])


@triton.jit
def _row_part(x, left, columns, COLUMNS: tl.constexpr, GROUP: tl.constexpr):
    column = left + tl.arange(0, COLUMNS)
    value = tl.load(x + column, mask=column < columns, other=0.0).to(tl.float32)
    if GROUP:
        value = rotate(value, COLUMNS, GROUP)
    return value


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
        tl.store(codes + column, encode(value, inverse, LARGEST, INTEGER, NATIVE), mask=column < columns)
    else:
        bits = tl.zeros([COLUMNS], tl.int32)
        for left in range(0, columns, COLUMNS):
            bits = tl.maximum(bits, magnitude(_row_part(x, left, columns, COLUMNS, GROUP)))
        step, inverse = code_scales(tl.max(bits, axis=0), LARGEST)
        for left in range(0, columns, COLUMNS):
            code = encode(_row_part(x, left, columns, COLUMNS, GROUP), inverse, LARGEST, INTEGER, NATIVE)
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
        tl.store(place, encode(value, inverse, LARGEST, INTEGER, NATIVE), mask=live)


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
        value = code.to(tl.float32)
    else:
        if NATIVE:
            value = code.to(tl.float8e4nv, bitcast=True).to(tl.float32)
        else:
            value = decode_e4m3(code).to(tl.float32)
    if BLOCK:
        block = tl.program_id(1) * (COLUMNS // BLOCK) + tl.arange(0, COLUMNS // BLOCK)
        inside = (row < rows)[:, None] & (block * BLOCK < columns)[None, :]
        step = tl.load(scale + (row // BLOCK)[:, None] * scale_stride + block[None, :], mask=inside, other=0.0)
        value = tl.reshape(tl.reshape(value, [ROWS, COLUMNS // BLOCK, BLOCK]) * step[:, :, None], [ROWS, COLUMNS])
    else:
        value *= tl.load(scale + row * row_scaled, mask=row < rows, other=0.0)[:, None]
    if GROUP:
        value = tl.reshape(rotate(tl.reshape(value, [ROWS * COLUMNS]), ROWS * COLUMNS, GROUP), [ROWS, COLUMNS])
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


def rows_config(columns: int) -> tuple[dict[str, object], int]:
    """The configuration of quantize_rows for rows of that many columns."""
    columns = triton.next_power_of_2(columns)
    limit = 16384
    return {"COLUMNS": min(columns, limit), "WHOLE": columns <= limit}, max(min(columns, limit) // 2048, 1)


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
        _quantize_blocks[grid](x, stored, scale, rows, columns, x.stride(0), rows, **numbers, **config, num_warps=warps)
    else:
        config, warps = rows_config(columns)
        _quantize_rows[(rows,)](
            x, stored, scale, columns, x.stride(0), **numbers, GROUP=rotate_by, **config, num_warps=warps
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

