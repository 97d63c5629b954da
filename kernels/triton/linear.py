"""Linear layers of 8-bit codes, in Triton: tensor cores multiply codes, the ordinary cores scale the sums of each block."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .. import tuning
from .quantize import as_stored, decode_e4m3, quantize_inputs

try:
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # older than 3.4
    TensorDescriptor = None

__all__ = ["CANDIDATES", "SHIPPED", "Launch", "autotuned_linear", "multiply", "scaled_linear"]


class Launch(NamedTuple):
    """How a product is cut up.

    Attributes:
        rows, columns, inner: one step's tile; ``inner`` is cut down to the block size.
        parts: a program works on so many tiles side by side (1 or 2): the sums of one need fewer registers.
        warps, stages: of a program, of its pipeline.
        tma: tiles are fetched by the tensor memory accelerator of SM 9.0.
    """

    rows: int
    columns: int
    inner: int
    parts: int
    warps: int
    stages: int
    tma: bool = False


# Shipped launches: (has the accelerator, most tokens) → launch; the first that fits is taken.
# SM 9.0 measured on an H200 (benchmarks/kernels.py); the others fit the shared memory of every card from SM 8.0 on.
SHIPPED = {
    (False, 16): Launch(16, 64, 128, 1, 4, 3),
    (False, 64): Launch(64, 64, 128, 1, 4, 3),
    (False, None): Launch(128, 128, 64, 1, 8, 3),
    (True, 16): Launch(16, 64, 128, 1, 4, 4),
    (True, 64): Launch(64, 64, 128, 1, 4, 4, tma=True),
    (True, None): Launch(128, 64, 128, 2, 8, 3, tma=True),
}
# What autotuning chooses from, besides the shipped one.
CANDIDATES = (
    Launch(16, 32, 128, 1, 4, 4),
    Launch(32, 64, 128, 1, 4, 4),
    Launch(64, 64, 128, 1, 4, 4),
    Launch(64, 128, 64, 1, 4, 4),
    Launch(128, 64, 128, 1, 4, 3),
    Launch(128, 128, 128, 1, 8, 3),
    Launch(64, 64, 128, 1, 4, 4, tma=True),
    Launch(64, 128, 128, 1, 4, 3, tma=True),
    Launch(128, 128, 128, 1, 8, 3, tma=True),
    Launch(128, 64, 128, 2, 8, 3, tma=True),
    Launch(128, 256, 128, 1, 8, 4, tma=True),
)


@triton.jit
def _codes(bits, like, INTEGER: tl.constexpr, DECODE: tl.constexpr):
    """Codes of a weight as the tensor cores take them."""
    if INTEGER:
        code = bits
    elif DECODE:
        code = decode_e4m3(bits).to(like)
    else:
        code = bits.to(tl.float8e4nv, bitcast=True)
    return code


@triton.jit
def _product(a, b, INTEGER: tl.constexpr):
    """The products' sums as float32; integers are summed exactly."""
    return tl.dot(a, b, out_dtype=tl.int32 if INTEGER else tl.float32, input_precision="ieee").to(tl.float32)


@triton.jit
def _finish(
    total,
    out,
    bias,
    row,
    column,
    rows,
    columns,
    input_scale,
    scale,
    row_scaled,
    BLOCK: tl.constexpr,
    DECODE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """Scale what is not scaled yet, add the bias and store."""
    value = total.to(tl.float32)
    if BLOCK == 0:
        if not DECODE:
            value *= tl.load(input_scale + row, mask=row < rows, other=0.0)[:, None]
        value *= tl.load(scale + column * row_scaled, mask=column < columns, other=0.0)[None, :]
    if HAS_BIAS:
        value += tl.load(bias + column, mask=column < columns, other=0.0).to(tl.float32)[None, :]
    place = out + row.to(tl.int64)[:, None] * columns + column[None, :]
    tl.store(place, value.to(out.dtype.element_ty), mask=(row < rows)[:, None] & (column < columns)[None, :])


@triton.jit
def _block_scale(scale, column, columns, step, scale_stride, INNER: tl.constexpr, BLOCK: tl.constexpr, COLUMNS: tl.constexpr):
    """The weight's scale of a step: one number where a tile's columns lie in one block, else one a column."""
    place = scale + step * INNER // BLOCK
    if BLOCK % COLUMNS == 0:
        factor = tl.load(place + tl.minimum(tl.min(column, axis=0), columns - 1) // BLOCK * scale_stride)
    else:
        factor = tl.load(place + tl.minimum(column, columns - 1) // BLOCK * scale_stride)
    return factor


@triton.jit
def _scaled_matmul(
    a,
    b,
    out,
    bias,
    input_scale,
    scale,
    rows,
    columns,
    inner,
    a_stride,
    b_stride,
    input_scale_stride,
    scale_stride,
    row_scaled,
    INTEGER: tl.constexpr,
    DECODE: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EVEN: tl.constexpr,
    TMA: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
    PARTS: tl.constexpr,
):
    # Neighbouring programs share rows and columns, so that both stay in the L2 cache.
    TALL: tl.constexpr = 8
    tiles_down, tiles_across = tl.cdiv(rows, ROWS), tl.cdiv(columns, COLUMNS * PARTS)
    program = tl.program_id(0)
    band = program // (TALL * tiles_across)
    height = tl.minimum(tiles_down - band * TALL, TALL)
    tile_row = band * TALL + program % (TALL * tiles_across) % height
    tile_column = program % (TALL * tiles_across) // height
    row = tile_row * ROWS + tl.arange(0, ROWS)
    column = tile_column * (COLUMNS * PARTS) + tl.arange(0, COLUMNS)
    k = tl.arange(0, INNER)
    second = column + COLUMNS
    if not TMA:
        # Rows and columns beyond the end read the last ones, and are not stored.
        a_place = a + tl.minimum(row, rows - 1).to(tl.int64)[:, None] * a_stride + k[None, :]
        b_place = b + tl.minimum(column, columns - 1).to(tl.int64)[None, :] * b_stride + k[:, None]
        if PARTS == 2:
            c_place = b + tl.minimum(second, columns - 1).to(tl.int64)[None, :] * b_stride + k[:, None]
    kind: tl.constexpr = tl.int32 if INTEGER and BLOCK == 0 else tl.float32
    total = tl.zeros([ROWS, COLUMNS], kind)
    total2 = total
    for step in range(0, tl.cdiv(inner, INNER)):
        if TMA:
            x = a.load([tile_row * ROWS, step * INNER])
            w = b.load([tile_column * (COLUMNS * PARTS), step * INNER]).T
            if PARTS == 2:
                v = b.load([tile_column * (COLUMNS * PARTS) + COLUMNS, step * INNER]).T
        elif EVEN:
            x = tl.load(a_place)
            w = tl.load(b_place)
            if PARTS == 2:
                v = tl.load(c_place)
        else:
            live = k < inner - step * INNER
            x = tl.load(a_place, mask=live[None, :], other=0)
            w = tl.load(b_place, mask=live[:, None], other=0)
            if PARTS == 2:
                v = tl.load(c_place, mask=live[:, None], other=0)
        if not INTEGER and not DECODE:
            x = x.to(tl.float8e4nv, bitcast=True)
        w = _codes(w, x.dtype, INTEGER, DECODE)
        if PARTS == 2:
            v = _codes(v, x.dtype, INTEGER, DECODE)
        if BLOCK == 0:
            total = tl.dot(x, w, total, out_dtype=kind)
            if PARTS == 2:
                total2 = tl.dot(x, v, total2, out_dtype=kind)
        else:
            if DECODE:
                own = tl.full([ROWS], 1.0, tl.float32)
            else:
                own = tl.load(input_scale + step * INNER // BLOCK * input_scale_stride + tl.minimum(row, rows - 1))
            s = _block_scale(scale, column, columns, step, scale_stride, INNER, BLOCK, COLUMNS)
            if BLOCK % COLUMNS == 0:
                total += _product(x, w, INTEGER) * (own * s)[:, None]
            else:
                total += _product(x, w, INTEGER) * own[:, None] * s[None, :]
            if PARTS == 2:
                s = _block_scale(scale, second, columns, step, scale_stride, INNER, BLOCK, COLUMNS)
                if BLOCK % COLUMNS == 0:
                    total2 += _product(x, v, INTEGER) * (own * s)[:, None]
                else:
                    total2 += _product(x, v, INTEGER) * own[:, None] * s[None, :]
        if not TMA:
            a_place += INNER
            b_place += INNER
            if PARTS == 2:
                c_place += INNER
    _finish(total, out, bias, row, column, rows, columns, input_scale, scale, row_scaled, BLOCK, DECODE, HAS_BIAS)
    if PARTS == 2:
        _finish(total2, out, bias, row, second, rows, columns, input_scale, scale, row_scaled, BLOCK, DECODE, HAS_BIAS)


def multiply(x, input_scale, codes, scale, bias, block_size: int, out_dtype: torch.dtype, launch: Launch) -> torch.Tensor:
    """x·ŵᵀ + bias; x are codes with their scale, or plain numbers (``input_scale`` None) against a weight that is decoded."""
    rows, inner = x.shape
    step = min(launch.inner, block_size) if block_size else launch.inner
    columns = codes.shape[0]
    out = torch.empty(rows, columns, dtype=out_dtype, device=x.device)
    decode = input_scale is None
    tiles = triton.cdiv(rows, launch.rows) * triton.cdiv(columns, launch.columns * launch.parts)
    a, b = x if decode else as_stored(x), as_stored(codes)
    if launch.tma:
        a = TensorDescriptor(a, a.shape, a.stride(), [launch.rows, step])
        b = TensorDescriptor(b, b.shape, b.stride(), [launch.columns, step])
    _scaled_matmul[(tiles,)](
        a,
        b,
        out,
        scale if bias is None else bias,
        scale if decode else input_scale,
        scale,
        rows,
        columns,
        inner,
        x.stride(0),
        codes.stride(0),
        0 if decode else input_scale.stride(1),
        scale.stride(0) if block_size else 0,
        int(scale.numel() > 1),
        INTEGER=codes.dtype is torch.int8,
        DECODE=decode,
        BLOCK=block_size,
        HAS_BIAS=bias is not None,
        EVEN=inner % step == 0,
        TMA=launch.tma,
        ROWS=launch.rows,
        COLUMNS=launch.columns,
        INNER=step,
        PARTS=launch.parts,
        num_warps=launch.warps,
        num_stages=launch.stages,
    )
    return out


def _can_tma(*operands: torch.Tensor) -> bool:
    """Whether the tensor memory accelerator takes these matrices: aligned, and rows of a multiple of 16 bytes."""
    return (
        TensorDescriptor is not None
        and torch.cuda.get_device_capability(operands[0].device) >= (9, 0)
        and all(entry.data_ptr() % 16 == 0 and entry.stride(0) * entry.element_size() % 16 == 0 for entry in operands)
    )


def _shipped(x: torch.Tensor, tma: bool, decode: bool) -> Launch:
    tma = tma and not decode
    return next(
        launch
        for (accelerator, most), launch in SHIPPED.items()
        if accelerator == tma and (most is None or x.shape[0] <= most)
    )


def _with_inputs(x, codes, scale, bias, block_size, rotate_by, out_dtype, choose) -> torch.Tensor:
    """Quantize x, unless the card has no arithmetic for its codes, and multiply as ``choose(inputs, tma, decode)`` says."""
    codes = codes if codes.stride(1) == 1 else codes.contiguous()
    decode = codes.dtype is not torch.int8 and torch.cuda.get_device_capability(x.device) < (8, 9)
    inputs, input_scale = (x.contiguous(), None) if decode else quantize_inputs(x, codes.dtype, block_size, rotate_by)
    scale = scale.float().contiguous()

    def run(launch: Launch) -> torch.Tensor:
        return multiply(inputs, input_scale, codes, scale, bias, block_size, out_dtype, launch)

    return run(choose(run, _can_tma(inputs, codes), decode))


def scaled_linear(x, codes, scale, bias, block_size: int, rotate_by: int, out_dtype: torch.dtype) -> torch.Tensor:
    """See :func:`...scaled_linear`; with shipped launches."""
    return _with_inputs(
        x, codes, scale, bias, block_size, rotate_by, out_dtype, lambda run, tma, decode: _shipped(x, tma, decode)
    )


def autotuned_linear(x, codes, scale, bias, block_size: int, rotate_by: int, out_dtype: torch.dtype) -> torch.Tensor:
    """See :func:`...scaled_linear`; with the launch that was measured to be the fastest for this shape."""

    def choose(run, tma: bool, decode: bool) -> Launch:
        shipped = _shipped(x, tma, decode)
        launches = [shipped, *(launch for launch in CANDIDATES if launch != shipped and (tma and not decode or not launch.tma))]
        known = {" ".join(map(str, launch)): launch for launch in launches}
        key = tuning.shape_key("launch", x, codes, block_size, out_dtype)
        return known[tuning.fastest(key, list(known), lambda name: run(known[name]))]

    return _with_inputs(x, codes, scale, bias, block_size, rotate_by, out_dtype, choose)
