"""8-bit linear layers in Triton: tensor cores multiply quantized values, CUDA cores scale the sum of each block."""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .. import devices, tuning
from ..hadamard import rotate
from .launcher import Descriptors, Launcher
from .quantize import as_bits, decode_e4m3, prepare_quantizer

try:
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # Triton before 3.4
    TensorDescriptor = None
# Gluon is experimental: import the SM 9.0 kernel only with the releases that it was compiled with.
if tuple(map(int, triton.__version__.split(".")[:2])) in ((3, 6), (3, 7)):
    from . import hopper
else:
    hopper = None

__all__ = [
    "CANDIDATES",
    "SHIPPED",
    "SHIPPED_FEW_ROWS",
    "Launch",
    "Operands",
    "prepare_autotuned_linear",
    "prepare_linear",
    "prepare_product",
    "shipped_launch",
]


class Launch(NamedTuple):
    """Launch configuration of a GEMM.

    Attributes:
        rows, columns, inner: tile sizes M, N and K; ``inner`` is limited to the block size.
        warps: warps per program.
        stages: depth of the software pipeline.
        tma: load tiles with the tensor memory accelerator (TMA) of SM 9.0.
    """

    rows: int
    columns: int
    inner: int
    warps: int
    stages: int
    tma: bool = False


# Shipped launches by TMA support, as (least number of tiles per multiprocessor, launch): the first one whose grid is large
# enough is used. Measured on an H200 for SM 9.0; those without TMA fit the shared memory of every GPU from SM 8.0 on.
SHIPPED = {
    True: (
        (5, Launch(128, 128, 128, 8, 3, tma=True)),
        (1, Launch(64, 128, 128, 4, 3, tma=True)),
        (0, Launch(64, 64, 128, 4, 4, tma=True)),
    ),
    False: ((1, Launch(128, 128, 64, 8, 3)), (0, Launch(64, 64, 128, 4, 3))),
}
# The same for at most FEW_ROWS rows, where loading the weight dominates.
FEW_ROWS = 16
SHIPPED_FEW_ROWS = ((1, Launch(FEW_ROWS, 128, 128, 4, 4)), (0, Launch(FEW_ROWS, 64, 256, 4, 4)))
# Least occupancy at which the SM 9.0 kernel is faster than the generic one, by whether the weight is int8.
LEAST_OCCUPANCY = {True: 0.8, False: 0.7}
# Candidates of autotuning, besides the shipped launch.
CANDIDATES = (
    Launch(16, 32, 128, 4, 4),
    Launch(32, 64, 128, 4, 4),
    Launch(64, 64, 128, 4, 4),
    Launch(64, 128, 64, 4, 4),
    Launch(128, 64, 128, 8, 3),
    Launch(128, 128, 128, 8, 3),
    Launch(64, 64, 128, 4, 4, tma=True),
    Launch(64, 128, 128, 4, 3, tma=True),
    Launch(128, 128, 128, 8, 3, tma=True),
    Launch(128, 64, 128, 4, 3, tma=True),
)


@triton.jit
def _to_operand(bits, like, INTEGER: tl.constexpr, DECODE: tl.constexpr):
    """Convert the bits of a weight tile to the operand dtype of the tensor cores."""
    if INTEGER:
        operand = bits
    elif DECODE:
        operand = decode_e4m3(bits).to(like)
    else:
        operand = bits.to(tl.float8e4nv, bitcast=True)
    return operand


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
):
    # Adjacent programs share rows and columns of the operands, which then stay in the L2 cache.
    BAND_ROWS: tl.constexpr = 8
    tiles_down, tiles_across = tl.cdiv(rows, ROWS), tl.cdiv(columns, COLUMNS)
    program = tl.program_id(0)
    band = program // (BAND_ROWS * tiles_across)
    height = tl.minimum(tiles_down - band * BAND_ROWS, BAND_ROWS)
    tile_row = band * BAND_ROWS + program % (BAND_ROWS * tiles_across) % height
    tile_column = program % (BAND_ROWS * tiles_across) // height
    row = tile_row * ROWS + tl.arange(0, ROWS)
    column = tile_column * COLUMNS + tl.arange(0, COLUMNS)
    k = tl.arange(0, INNER)
    if not TMA:
        # Out-of-range rows and columns read the last one; their results are not stored.
        a_pointers = a + tl.minimum(row, rows - 1).to(tl.int64)[:, None] * a_stride + k[None, :]
        b_pointers = b + tl.minimum(column, columns - 1).to(tl.int64)[None, :] * b_stride + k[:, None]
    accumulator_dtype: tl.constexpr = tl.int32 if INTEGER and BLOCK == 0 else tl.float32
    total = tl.zeros([ROWS, COLUMNS], accumulator_dtype)
    for step in range(0, tl.cdiv(inner, INNER)):
        if TMA:
            x = a.load([tile_row * ROWS, step * INNER])
            w = b.load([tile_column * COLUMNS, step * INNER]).T
        elif EVEN:
            x = tl.load(a_pointers)
            w = tl.load(b_pointers)
        else:
            inside = k < inner - step * INNER
            x = tl.load(a_pointers, mask=inside[None, :], other=0)
            w = tl.load(b_pointers, mask=inside[:, None], other=0)
        if not INTEGER and not DECODE:
            x = x.to(tl.float8e4nv, bitcast=True)
        w = _to_operand(w, x.dtype, INTEGER, DECODE)
        if BLOCK == 0:
            total = tl.dot(x, w, total, out_dtype=accumulator_dtype)
        else:
            block = step * INNER // BLOCK
            part = tl.dot(x, w, out_dtype=tl.int32 if INTEGER else tl.float32).to(tl.float32)
            row_scale = tl.full([ROWS], 1.0, tl.float32)
            if not DECODE:
                row_scale = tl.load(input_scale + block * input_scale_stride + tl.minimum(row, rows - 1))
            if (
                BLOCK % COLUMNS == 0
            ):  # the tile is within one block of columns: fold its only scale into those of the rows
                first = tl.minimum(tile_column * COLUMNS, columns - 1)
                total += part * (row_scale * tl.load(scale + first // BLOCK * scale_stride + block))[:, None]
            else:
                column_scale = tl.load(scale + tl.minimum(column, columns - 1) // BLOCK * scale_stride + block)
                total += part * row_scale[:, None] * column_scale[None, :]
        if not TMA:
            a_pointers += INNER
            b_pointers += INNER
    value = total.to(tl.float32)
    if BLOCK == 0:
        if not DECODE:
            value *= tl.load(input_scale + row, mask=row < rows, other=0.0)[:, None]
        value *= tl.load(scale + column * row_scaled, mask=column < columns, other=0.0)[None, :]
    if HAS_BIAS:
        value += tl.load(bias + column, mask=column < columns, other=0.0).to(tl.float32)[None, :]
    pointers = out + row.to(tl.int64)[:, None] * columns + column[None, :]
    tl.store(pointers, value.to(out.dtype.element_ty), mask=(row < rows)[:, None] & (column < columns)[None, :])


class Operands(NamedTuple):
    """Quantized operands of a product.

    Attributes:
        x: bits of the quantized activations (M, K) with ``input_scale``; or unquantized ones with ``input_scale`` None, which
            are multiplied by the dequantized FP8 weight.
        input_scale: float32 (⌈K/block_size⌉ or 1, M), or None.
        qdata: bits of the quantized weight (N, K), contiguous.
        scale: float32 (N, 1), (1, 1) or one per block.
        bias: (N,) or None.
    """

    x: torch.Tensor
    input_scale: torch.Tensor | None
    qdata: torch.Tensor
    scale: torch.Tensor
    bias: torch.Tensor | None


def prepare_product(operands: Operands, block_size: int, out_dtype: torch.dtype, launch: Launch, keep: bool = True):
    """Prepare x·ŵᵀ + bias for operands with the shapes, dtypes and alignment of ``operands``; returns a function of them."""
    x, input_scale, qdata, scale, bias = operands
    (rows, inner), columns, device = x.shape, qdata.shape[0], x.device
    step = min(launch.inner, block_size) if block_size else launch.inner
    decode, tma = input_scale is None, launch.tma
    tiles = triton.cdiv(rows, launch.rows) * triton.cdiv(columns, launch.columns)
    constants = {
        "INTEGER": qdata.dtype is torch.int8,
        "DECODE": decode,
        "BLOCK": block_size,
        "HAS_BIAS": bias is not None,
        "EVEN": inner % step == 0,
        "TMA": tma,
        "ROWS": launch.rows,
        "COLUMNS": launch.columns,
        "INNER": step,
    }
    run = Launcher(
        _scaled_matmul, (tiles,), constants, device, keep=keep, num_warps=launch.warps, num_stages=launch.stages
    )
    scale_stride = scale.stride(0) if block_size else 0
    sizes = (rows, columns, inner, inner, inner, 0 if decode else rows, scale_stride, int(scale.numel() > 1))
    if tma:
        a_descriptors = Descriptors(TensorDescriptor(x, x.shape, x.stride(), [launch.rows, step]))
        b_descriptors = Descriptors(TensorDescriptor(qdata, qdata.shape, qdata.stride(), [launch.columns, step]))

    def multiply(operands: Operands) -> torch.Tensor:
        a, input_scale, b, scale, bias = operands
        out = torch.empty((rows, columns), dtype=out_dtype, device=device)
        if tma:
            a, b = a_descriptors.bind(a), b_descriptors.bind(b)
        run(a, b, out, scale if bias is None else bias, scale if decode else input_scale, scale, *sizes)
        return out

    return multiply


def _can_tma(*operands: torch.Tensor) -> bool:
    """Whether TMA can load these matrices: base addresses and row strides are multiples of 16 bytes."""
    return (
        TensorDescriptor is not None
        and torch.cuda.get_device_capability(operands[0].device) >= (9, 0)
        and all(entry.data_ptr() % 16 == 0 and entry.stride(0) * entry.element_size() % 16 == 0 for entry in operands)
    )


def _prefers_hopper_kernel(qdata: torch.Tensor, rows: int, block_size: int) -> bool:
    """Whether the kernel for SM 9.0 supports this product and is the faster one."""
    return (
        hopper is not None
        and torch.cuda.get_device_capability(qdata.device)[0] == 9
        and block_size > 0
        and block_size % hopper.SHIPPED.inner == 0
        and hopper.occupancy(rows, qdata.shape[0], qdata.device) >= LEAST_OCCUPANCY[qdata.dtype is torch.int8]
    )


def shipped_launch(activations: torch.Tensor, qdata: torch.Tensor, block_size: int, decode: bool):
    """Select the shipped launch for activations (M, K) and a quantized weight (N, K), without measuring."""
    rows, columns = activations.shape[0], qdata.shape[0]
    few = rows <= FEW_ROWS
    tma = not decode and not few and _can_tma(activations, qdata)
    if tma and _prefers_hopper_kernel(qdata, rows, block_size):
        return hopper.SHIPPED
    processors = torch.cuda.get_device_properties(qdata.device).multi_processor_count
    return next(
        launch
        for least, launch in (SHIPPED_FEW_ROWS if few else SHIPPED[tma])
        if triton.cdiv(rows, launch.rows) * triton.cdiv(columns, launch.columns) >= least * processors
    )


def _candidate_launches(
    activations: torch.Tensor, qdata: torch.Tensor, block_size: int, decode: bool
) -> dict[str, NamedTuple]:
    """Candidates of autotuning by name, the shipped launch first."""
    tma = not decode and _can_tma(activations, qdata)
    others = [launch for launch in CANDIDATES if tma or not launch.tma]
    if tma and hopper is not None and block_size and block_size % hopper.SHIPPED.inner == 0:
        others.append(hopper.SHIPPED)
    return {
        " ".join(map(str, launch)): launch
        for launch in (shipped_launch(activations, qdata, block_size, decode), *others)
    }


def prepare_linear(
    x, qdata, scale, bias, block_size: int, rotate_by: int, out_dtype: torch.dtype, choose=None, keep: bool = True
):
    """Prepare :func:`...operators.scaled_linear` for tensors with the shapes, dtypes and alignment of the arguments.

    Args:
        x: activations (M, K), contiguous.
        qdata: quantized weight (N, K), contiguous.
        scale: float32, contiguous.
        choose: (run, operands) → launch, where ``run(launch)`` computes the product; None for the shipped launch.
        keep: see :class:`.launcher.Launcher`.

    Returns:
        Function of (x, qdata, scale, bias).
    """
    if qdata.dtype is torch.int8 or devices.has_fp8_matmul(x.device):
        quantize = prepare_quantizer(x, qdata.dtype, block_size, rotate_by, keep)
    else:
        quantize = functools.partial(_rotate_only, rotate_by=rotate_by)

    def operands(x, qdata, scale, bias) -> Operands:
        activations, input_scale = quantize(x)
        if input_scale is not None:
            activations = as_bits(activations)
        return Operands(activations, input_scale, as_bits(qdata), scale, bias)

    first = operands(x, qdata, scale, bias)
    decode = first.input_scale is None

    def prepare(launch):
        product = prepare_product if isinstance(launch, Launch) else hopper.prepare_product
        return product(first, block_size, out_dtype, launch, keep)

    if choose is None:
        launch = shipped_launch(first.x, first.qdata, block_size, decode)
    else:
        launch = choose(_candidate_launches(first.x, first.qdata, block_size, decode), lambda it: prepare(it)(first))
    multiply = prepare(launch)

    def linear(x, qdata, scale, bias) -> torch.Tensor:
        return multiply(operands(x, qdata, scale, bias))

    return linear


def _rotate_only(x: torch.Tensor, rotate_by: int) -> tuple[torch.Tensor, None]:
    """Activations for a dequantized weight: rotated, not quantized."""
    return (rotate(x, rotate_by).to(x.dtype) if rotate_by else x), None


def prepare_autotuned_linear(x, qdata, scale, bias, block_size: int, rotate_by: int, out_dtype: torch.dtype, **options):
    """As :func:`prepare_linear`, with the launch measured as fastest for this shape."""
    key = tuning.shape_key("launch", x, qdata, block_size, out_dtype)

    def choose(launches, run):
        return launches[tuning.fastest(key, list(launches), lambda name: run(launches[name]))]

    return prepare_linear(x, qdata, scale, bias, block_size, rotate_by, out_dtype, choose, **options)
