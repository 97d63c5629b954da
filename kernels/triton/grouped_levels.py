"""Linear layers with W4A8 weights in Triton: 4-bit indices of levels, scaled per group to the INT8 values that are multiplied.

For many tokens the weight is expanded to INT8 first, which takes less time than to expand a tile for every tile of tokens. For
few tokens one kernel expands and multiplies, because reading the weight takes most of the time.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .launcher import Launcher
from .linear import Operands, prepare_product, shipped_launch
from .quantize import decode_e4m3, prepare_quantizer

__all__ = ["EXPAND", "FEW_TOKENS", "FewTokens", "expand_weight", "launch_of_few", "prepare_w4a8_linear"]

EXPAND = ({"GROUPS": 512}, 4)  # constexpr values and warps of the expansion
_MAGIC = tl.constexpr(12582912.0)  # 1.5·2²³: adding it rounds to an integer in the low mantissa bits


class FewTokens(NamedTuple):
    """Launch configuration of the product with few tokens.

    Attributes:
        rows, columns: tile sizes M and N.
        packed: bytes of a row per step, each with two input channels.
        warps: warps per program.
        stages: depth of the software pipeline.
    """

    rows: int
    columns: int
    packed: int
    warps: int
    stages: int


# Shipped launches by the largest number of tokens; the weight is expanded for more tokens.
FEW_TOKENS = {16: FewTokens(16, 32, 128, 4, 3), 32: FewTokens(32, 32, 128, 4, 3), 64: FewTokens(64, 64, 64, 4, 3)}
_PROGRAMS = 4  # per multiprocessor, which the input channels are split for
_MOST_SPLITS = 16


@triton.jit
def _decode_scale(scale, E4M3: tl.constexpr):
    """Group scales as float32."""
    if E4M3:
        scale = decode_e4m3(scale).to(tl.float32)
    return scale


@triton.jit
def _expand(index, codebook, scale, HAS_CODEBOOK: tl.constexpr):
    """Round levels times their scale to int8; ``index``: int32 in 0…15, ``scale``: float32.

    The clamping keeps the compiler from a fused multiply-add, which would round otherwise than plain torch.
    """
    level = tl.load(codebook + index) if HAS_CODEBOOK else (index - 8).to(tl.float32)
    value = tl.minimum(tl.maximum(level * scale, -127.0), 127.0)
    return (value + _MAGIC).to(tl.int32, bitcast=True).to(tl.int8)


@triton.jit
def _expand_weight(
    packed, scale, codebook, values, groups,
    E4M3: tl.constexpr, HAS_CODEBOOK: tl.constexpr, HALF: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    # Rows of the weight need not be told apart: groups are consecutive in every tensor.
    group = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    inside = group < groups
    factor = _decode_scale(tl.load(scale + group, mask=inside, other=0), E4M3)[:, None]
    byte = group[:, None] * HALF + tl.arange(0, HALF)[None, :]
    pair = tl.load(packed + byte, mask=inside[:, None], other=0).to(tl.int32)
    low = _expand(pair & 15, codebook, factor, HAS_CODEBOOK)
    high = _expand(pair >> 4, codebook, factor, HAS_CODEBOOK)
    column = group[:, None] * (2 * HALF) + tl.arange(0, 2 * HALF)[None, :]
    tl.store(values + column, tl.reshape(tl.join(low, high), [GROUPS, 2 * HALF]), mask=inside[:, None])


@triton.jit
def _multiply_few_tokens(
    pairs, packed, out, group_scale, codebook, bias, input_scale, scale, sums, arrived,
    rows, columns, width, groups, steps,
    E4M3: tl.constexpr, HAS_CODEBOOK: tl.constexpr, HAS_BIAS: tl.constexpr, HALF: tl.constexpr, EVEN: tl.constexpr,
    SPLITS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    # A byte of the weight has an even and an odd input channel, as has an int16 of the activations: two products.
    tile, split = tl.program_id(0), tl.program_id(1)
    row, column = tl.arange(0, ROWS), tile * COLUMNS + tl.arange(0, COLUMNS)
    near_row, near_column = tl.minimum(row, rows - 1), tl.minimum(column, columns - 1).to(tl.int64)
    k, of_group = tl.arange(0, PACKED), tl.arange(0, PACKED // HALF)
    total = tl.zeros([ROWS, COLUMNS], tl.int32)
    for step in range(split * steps, (split + 1) * steps):
        byte, group = step * PACKED + k, step * (PACKED // HALF) + of_group
        weights = packed + near_column[None, :] * width + byte[:, None]
        scales = group_scale + near_column[None, :] * groups + group[:, None]
        inputs = pairs + near_row[:, None] * width + byte[None, :]
        if EVEN:
            index, factor, x = tl.load(weights), tl.load(scales), tl.load(inputs)
        else:
            index = tl.load(weights, mask=byte[:, None] < width, other=0)
            factor = tl.load(scales, mask=group[:, None] < groups, other=0)
            x = tl.load(inputs, mask=byte[None, :] < width, other=0)
        factor = tl.broadcast_to(_decode_scale(factor, E4M3)[:, None, :], [PACKED // HALF, HALF, COLUMNS])
        factor = tl.reshape(factor, [PACKED, COLUMNS])
        index = index.to(tl.int32)
        total = tl.dot(x.to(tl.int8), _expand(index & 15, codebook, factor, HAS_CODEBOOK), total, out_dtype=tl.int32)
        total = tl.dot(
            (x >> 8).to(tl.int8), _expand(index >> 4, codebook, factor, HAS_CODEBOOK), total, out_dtype=tl.int32
        )
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    at = row[:, None] * columns + column[None, :]
    last = SPLITS == 1
    if SPLITS > 1:
        # Sums of integers do not depend on the order. The last program to arrive scales them.
        tl.atomic_add(sums + at, total, mask=inside, sem="relaxed")
        tl.debug_barrier()
        last = tl.atomic_add(arrived + tile, 1) == SPLITS - 1
    if last:
        if SPLITS > 1:
            total = tl.load(sums + at, mask=inside, other=0, cache_modifier=".cg")
        value = total.to(tl.float32) * tl.load(input_scale + near_row)[:, None] * tl.load(scale + near_column)[None, :]
        if HAS_BIAS:
            value += tl.load(bias + near_column).to(tl.float32)[None, :]
        tl.store(out + at, value.to(out.dtype.element_ty), mask=inside)


def _scale_bits(group_scale: torch.Tensor) -> torch.Tensor:
    """View group scales as kernels expect them: float32 unchanged, float8_e4m3fn as uint8."""
    return group_scale if group_scale.dtype is torch.float32 else group_scale.view(torch.uint8)


def _constants(group_scale: torch.Tensor, codebook: torch.Tensor | None, group: int) -> dict[str, object]:
    """Values of the constexpr parameters that both kernels have."""
    e4m3 = group_scale.dtype is not torch.float32
    return {"E4M3": e4m3, "HAS_CODEBOOK": codebook is not None, "HALF": group // 2}


def _prepare_expansion(qdata, group_scale, codebook, keep: bool):
    """Prepare the expansion of weights with the shapes, dtypes and alignment of the arguments; returns a function of them."""
    (out, packed), device, groups = qdata.shape, qdata.device, group_scale.numel()
    config, warps = EXPAND
    constants = {**_constants(group_scale, codebook, 2 * qdata.numel() // groups), **config}
    grid = (triton.cdiv(groups, config["GROUPS"]),)
    run = Launcher(_expand_weight, grid, constants, device, keep=keep, num_warps=warps)

    def expand(qdata, group_scale, codebook) -> torch.Tensor:
        values = torch.empty((out, 2 * packed), dtype=torch.int8, device=device)
        scale = _scale_bits(group_scale)
        run(qdata.view(torch.uint8), scale, scale if codebook is None else codebook, values, groups)
        return values

    return expand


def expand_weight(qdata: torch.Tensor, group_scale: torch.Tensor, codebook: torch.Tensor | None) -> torch.Tensor:
    """See :func:`..reference.grouped_levels.expand_weight`."""
    arguments = qdata.contiguous(), group_scale.contiguous(), codebook if codebook is None else codebook.contiguous()
    return _prepare_expansion(*arguments, keep=False)(*arguments)


def launch_of_few(tokens: int) -> FewTokens | None:
    """The shipped launch for that many tokens; None where the weight is expanded first."""
    return next((launch for most, launch in FEW_TOKENS.items() if tokens <= most), None)


def _count_splits(launch: FewTokens, columns: int, width: int, processors: int) -> int:
    """In how many parts the input channels are split, so that all multiprocessors have programs; a power of two."""
    tiles, steps = triton.cdiv(columns, launch.columns), triton.cdiv(width, launch.packed)
    splits = 1
    while splits < _MOST_SPLITS and 2 * splits <= steps and tiles * splits < _PROGRAMS * processors:
        splits *= 2
    return splits


def _prepare_few(tensors, quantized, out_dtype: torch.dtype, launch: FewTokens, keep: bool):
    """Prepare the product with few tokens; returns a function of such tensors and quantized activations."""
    qdata, group_scale, _, codebook, bias = tensors
    (columns, width), device, rows = qdata.shape, qdata.device, quantized[0].shape[0]
    groups = group_scale.shape[1]
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    splits = _count_splits(launch, columns, width, processors)
    tiles, steps = triton.cdiv(columns, launch.columns), triton.cdiv(width, launch.packed * splits)
    constants = _constants(group_scale, codebook, 2 * width // groups) | {
        "HAS_BIAS": bias is not None,
        "EVEN": width % (launch.packed * splits) == 0,
        "SPLITS": splits,
        "ROWS": launch.rows,
        "COLUMNS": launch.columns,
        "PACKED": launch.packed,
    }
    sizes = rows, columns, width, groups, steps
    run = Launcher(
        _multiply_few_tokens,
        (tiles, splits),
        constants,
        device,
        keep=keep,
        num_warps=launch.warps,
        num_stages=launch.stages,
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
            x.view(torch.int16), qdata.view(torch.uint8), out, _scale_bits(group_scale),
            scale if codebook is None else codebook, scale if bias is None else bias, input_scale, scale, sums, arrived, *sizes,
        )  # fmt: skip
        return out

    return multiply


def prepare_w4a8_linear(
    x, qdata, group_scale, scale, codebook, bias, rotate_by: int, out_dtype: torch.dtype, keep: bool = True
):
    """Prepare :func:`...operators.w4a8_linear` for tensors with the shapes, dtypes and alignment of the arguments.

    Args:
        x: activations (M, K), contiguous.
        qdata: one-byte dtype (N, K/2), contiguous.
        group_scale: float8_e4m3fn or float32 (N, K/group), contiguous.
        scale: float32 (N,), contiguous.
        codebook: float32 (16,) or None.
        keep: see :class:`.launcher.Launcher`.

    Returns:
        Function of (x, qdata, group_scale, scale, codebook, bias).
    """
    quantize = prepare_quantizer(x, torch.int8, 0, rotate_by, keep)
    quantized = quantize(x)
    launch = launch_of_few(x.shape[0])
    if launch is not None:
        multiply = _prepare_few((qdata, group_scale, scale, codebook, bias), quantized, out_dtype, launch, keep)
        return lambda x, *tensors: multiply(tensors, quantize(x))

    expand = _prepare_expansion(qdata, group_scale, codebook, keep)
    operands = Operands(*quantized, expand(qdata, group_scale, codebook), scale, bias)
    product = prepare_product(operands, 0, out_dtype, shipped_launch(operands.x, operands.qdata, 0, False), keep)

    def linear(x, qdata, group_scale, scale, codebook, bias) -> torch.Tensor:
        return product(Operands(*quantize(x), expand(qdata, group_scale, codebook), scale, bias))

    return linear
