"""Block-scaled GEMM for SM 9.0 in Gluon: Triton with explicit layouts, barriers and warp specialization.

In plain Triton the tensor cores are idle while the CUDA cores scale the sums of a block. Here one warp partition loads
operands, and two partitions compute half of a tile's rows each: one scales its sums while the other one multiplies. The
kernel is persistent: tiles are processed in waves. If the last wave would use at most half of the multiprocessors, its
tiles are split in two.
"""

from typing import NamedTuple

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from .launcher import Descriptors, Launcher

__all__ = ["SHIPPED", "Specialized", "occupancy", "prepare_product"]


class Specialized(NamedTuple):
    """Launch configuration of the warp-specialized GEMM.

    Attributes:
        rows: tile size M; each of the two multiplying partitions computes half of it.
        part: columns of one tensor core product; a tile has 4 parts, half a tile has 2.
        inner: tile size K.
        stages: depth of the load pipeline.
    """

    rows: int
    part: int
    inner: int
    stages: int

    @property
    def columns(self) -> int:
        """Tile size N."""
        return 4 * self.part


SHIPPED = Specialized(128, 64, 128, 4)
WARPS = 4  # per multiplying partition


@gluon.jit
def _locate_tile(unit, first, rows, columns, ROWS: gl.constexpr, COLUMNS: gl.constexpr, PARTS: gl.constexpr):
    """Top row and left column of a work unit: a tile counted from ``first`` on, or half of one.

    Adjacent units share rows and columns of the operands, which then stay in the L2 cache.
    """
    BAND_ROWS: gl.constexpr = 8
    HALVES: gl.constexpr = 4 // PARTS
    index = first + unit // HALVES
    down, across = gl.cdiv(rows, ROWS), gl.cdiv(columns, COLUMNS)
    band = index // (BAND_ROWS * across)
    height = gl.minimum(down - band * BAND_ROWS, BAND_ROWS)
    within = index % (BAND_ROWS * across)
    column = within // height * COLUMNS + unit % HALVES * (COLUMNS // HALVES)
    return (band * BAND_ROWS + within % height) * ROWS, column


@gluon.jit
def _load_tiles(a, b, rings, sizes, constants: gl.constexpr):
    """Partition that loads the operands of every step as soon as their pipeline stage is free."""
    a_ring, b_ring, ready, free = rings
    rows, columns, inner, first, units, _, _ = sizes
    ROWS: gl.constexpr = constants[3]
    COLUMNS: gl.constexpr = 4 * constants[4]
    INNER: gl.constexpr = constants[5]
    STAGES: gl.constexpr = constants[6]
    PARTS: gl.constexpr = constants[7]
    steps = gl.cdiv(inner, INNER)
    step = 0
    for unit in range(gl.program_id(0), units, gl.num_programs(0)):
        top, left = _locate_tile(unit, first, rows, columns, ROWS, COLUMNS, PARTS)
        for k in range(0, steps):
            slot = step % STAGES
            bar = ready.index(slot)
            mbarrier.wait(free.index(slot), (step // STAGES & 1) ^ 1)
            mbarrier.expect(bar, a.block_type.nbytes + b.block_type.nbytes)
            tma.async_copy_global_to_shared(a, [top, k * INNER], bar, a_ring.index(slot))
            tma.async_copy_global_to_shared(b, [left, k * INNER], bar, b_ring.index(slot))
            step += 1


@gluon.jit
def _store(value, out, bias, top, left, rows, columns, HAS_BIAS: gl.constexpr, ROWS: gl.constexpr, PART: gl.constexpr):
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // PART, PART // 8], [4, 1], [1, 0])
    row = top + gl.arange(0, ROWS, gl.SliceLayout(1, layout))
    column = left + gl.arange(0, PART, gl.SliceLayout(0, layout))
    value = gl.convert_layout(value, layout)
    if HAS_BIAS:
        value += gl.load(bias + column, mask=column < columns, other=0.0).to(gl.float32)[None, :]
    pointers = out + row.to(gl.int64)[:, None] * columns + column[None, :]
    gl.store(pointers, value.to(out.dtype.element_ty), mask=(row < rows)[:, None] & (column < columns)[None, :])


@gluon.jit
def _multiply_part(x, w, INDEX: gl.constexpr, registers, PART: gl.constexpr):
    """Product of one part of a tile's columns, in ``registers``."""
    part = w.slice(INDEX * PART, PART, 0).permute((1, 0))
    return hopper.warpgroup_mma_wait(0, deps=(hopper.warpgroup_mma(x, part, registers, use_acc=False, is_async=True),))


@gluon.jit
def _multiply(tensors, rings, sizes, HALF: gl.constexpr, constants: gl.constexpr):
    """Partition that computes half of a tile's rows; while it scales sums, the other half uses the tensor cores."""
    out, bias, input_scale, scale = tensors
    a_ring, b_ring, ready, free = rings
    rows, columns, inner, first, units, input_scale_stride, scale_stride = sizes
    INTEGER: gl.constexpr = constants[0]
    BLOCK: gl.constexpr = constants[1]
    HAS_BIAS: gl.constexpr = constants[2]
    ROWS: gl.constexpr = constants[3]
    PART: gl.constexpr = constants[4]
    INNER: gl.constexpr = constants[5]
    STAGES: gl.constexpr = constants[6]
    PARTS: gl.constexpr = constants[7]
    COLUMNS: gl.constexpr = 4 * PART
    OWN: gl.constexpr = ROWS // 2
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, PART, 32])
    accumulator_dtype: gl.constexpr = gl.int32 if INTEGER else gl.float32
    steps = gl.cdiv(inner, INNER)
    last_block = (columns - 1) // BLOCK
    step = 0
    part = gl.zeros([OWN, PART], accumulator_dtype, layout)
    for unit in range(gl.program_id(0), units, gl.num_programs(0)):
        top, left = _locate_tile(unit, first, rows, columns, ROWS, COLUMNS, PARTS)
        top += HALF * OWN
        row = gl.minimum(top + gl.arange(0, OWN, gl.SliceLayout(1, layout)), rows - 1)
        total0 = gl.zeros([OWN, PART], gl.float32, layout)
        total1 = total0
        total2 = total0
        total3 = total0
        for k in range(0, steps):
            slot = step % STAGES
            row_scale = gl.load(input_scale + k * INNER // BLOCK * input_scale_stride + row)
            step_scale = scale + k * INNER // BLOCK
            s0 = row_scale * gl.load(step_scale + gl.minimum(left // BLOCK, last_block) * scale_stride)
            s1 = row_scale * gl.load(step_scale + gl.minimum((left + PART) // BLOCK, last_block) * scale_stride)
            if PARTS == 4:
                s2 = row_scale * gl.load(step_scale + gl.minimum((left + 2 * PART) // BLOCK, last_block) * scale_stride)
                s3 = row_scale * gl.load(step_scale + gl.minimum((left + 3 * PART) // BLOCK, last_block) * scale_stride)
            mbarrier.wait(ready.index(slot), step // STAGES & 1)
            x, w = a_ring.index(slot).slice(HALF * OWN, OWN, 0), b_ring.index(slot)
            part = _multiply_part(x, w, 0, part, PART)
            total0 += part.to(gl.float32) * s0[:, None]
            part = _multiply_part(x, w, 1, part, PART)
            if PARTS == 4:
                total1 += part.to(gl.float32) * s1[:, None]
                part = _multiply_part(x, w, 2, part, PART)
                total2 += part.to(gl.float32) * s2[:, None]
                part = _multiply_part(x, w, 3, part, PART)
            mbarrier.arrive(free.index(slot), count=1)
            if PARTS == 4:
                total3 += part.to(gl.float32) * s3[:, None]
            else:
                total1 += part.to(gl.float32) * s1[:, None]
            step += 1
        _store(total0, out, bias, top, left, rows, columns, HAS_BIAS, OWN, PART)
        _store(total1, out, bias, top, left + PART, rows, columns, HAS_BIAS, OWN, PART)
        if PARTS == 4:
            _store(total2, out, bias, top, left + 2 * PART, rows, columns, HAS_BIAS, OWN, PART)
            _store(total3, out, bias, top, left + 3 * PART, rows, columns, HAS_BIAS, OWN, PART)


@gluon.jit
def _block_matmul(
    a,
    b,
    out,
    bias,
    input_scale,
    scale,
    rows,
    columns,
    inner,
    first,
    units,
    input_scale_stride,
    scale_stride,
    INTEGER: gl.constexpr,
    BLOCK: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    ROWS: gl.constexpr,
    PART: gl.constexpr,
    INNER: gl.constexpr,
    STAGES: gl.constexpr,
    PARTS: gl.constexpr,
):
    a_ring = gl.allocate_shared_memory(a.dtype, [STAGES, ROWS, INNER], a.layout)
    b_ring = gl.allocate_shared_memory(b.dtype, [STAGES, PARTS * PART, INNER], b.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(ready.index(stage), count=1)
        mbarrier.init(free.index(stage), count=2)
    hopper.fence_async_shared()
    tensors = (out, bias, input_scale, scale)
    rings = (a_ring, b_ring, ready, free)
    sizes = (rows, columns, inner, first, units, input_scale_stride, scale_stride)
    constants: gl.constexpr = (INTEGER, BLOCK, HAS_BIAS, ROWS, PART, INNER, STAGES, PARTS)
    gl.warp_specialize(
        [
            (_multiply, (tensors, rings, sizes, 0, constants)),
            (_multiply, (tensors, rings, sizes, 1, constants)),
            (_load_tiles, (a, b, rings, sizes, constants)),
        ],
        [4, 1],
        [240, 24],
    )


def _split_waves(rows: int, columns: int, device: torch.device) -> tuple[int, int, int]:
    """Number of whole tiles, number of tiles to halve, and number of multiprocessors."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    tiles = triton.cdiv(rows, SHIPPED.rows) * triton.cdiv(columns, SHIPPED.columns)
    last = tiles % processors
    halved = last if 2 * last <= processors else 0
    return tiles - halved, halved, processors


def occupancy(rows: int, columns: int, device: torch.device) -> float:
    """Mean fraction of multiprocessors in use over all waves of tiles; 1 if the last wave is full."""
    whole, halved, processors = _split_waves(rows, columns, device)
    waves = triton.cdiv(whole, processors) + (0.5 if halved else 0)
    return (whole + halved) / (waves * processors)


def prepare_product(operands, block_size: int, out_dtype: torch.dtype, launch: Specialized, keep: bool = True):
    """As :func:`.linear.prepare_product`; the block size is a multiple of 128."""
    x, _input_scale, qdata, scale, bias = operands
    (rows, inner), columns, device = x.shape, qdata.shape[0], x.device
    integer = qdata.dtype is torch.int8
    element = torch.int8 if integer else torch.float8_e4m3fn
    whole, halved, processors = _split_waves(rows, columns, device)
    constants = {
        "INTEGER": integer,
        "BLOCK": block_size,
        "HAS_BIAS": bias is not None,
        "ROWS": launch.rows,
        "PART": launch.part,
        "INNER": launch.inner,
        "STAGES": launch.stages,
    }

    def describe(matrix: torch.Tensor, height: int) -> Descriptors:
        tile = [height, launch.inner]
        layout = gl.NVMMASharedLayout.get_default_for(tile, gl.int8 if integer else gl.float8e4nv)
        return Descriptors(TensorDescriptor.from_tensor(matrix.view(element), tile, layout))

    a_descriptors = describe(x, launch.rows)
    parts = [
        (
            Launcher(
                _block_matmul,
                (min(units, processors),),
                {**constants, "PARTS": parts},
                device,
                keep=keep,
                num_warps=WARPS,
            ),
            describe(qdata, parts * launch.part),
            (rows, columns, inner, first, units, rows, scale.stride(0)),
        )
        for first, units, parts in ((0, whole, 4), (whole, 2 * halved, 2))
        if units
    ]

    def multiply(operands) -> torch.Tensor:
        x, input_scale, qdata, scale, bias = operands
        out = torch.empty((rows, columns), dtype=out_dtype, device=device)
        a, weight = a_descriptors.bind(x.view(element)), qdata.view(element)
        for run, b_descriptors, sizes in parts:
            b = b_descriptors.bind(weight)
            run(a, b, out, scale if bias is None else bias, input_scale, scale, *sizes)
        return out

    return multiply
