"""The kernels of layers as torch operators, which torch.compile and CUDA graphs accept, and the public functions.

Operator schemas and public parameters keep the name ``codes`` for quantized values (``qdata`` elsewhere) and ``tile`` for
a scale group: they are part of the API.
"""

import functools

import torch

from .backends import implementation
from .checks import (
    check,
    check_block_size,
    check_linear,
    check_rotation,
    check_scale,
    check_w4a8,
    check_w4a8_weight,
)
from .element_format import ElementArithmetic
from .prepared import prepared_linear, prepared_w4a8_linear

__all__ = [
    "dequantize_weight",
    "expand_w4a8_weight",
    "fp8_block_linear",
    "fp8_row_linear",
    "int8_block_linear",
    "int8_row_linear",
    "quantize_fp8_block",
    "quantize_fp8_block_weight",
    "quantize_fp8_row",
    "quantize_fp8_row_weight",
    "quantize_int8_block",
    "quantize_int8_block_weight",
    "quantize_int8_row",
    "quantize_int8_row_weight",
    "round_block",
    "round_block_beam",
    "scale_errors",
    "scaled_linear",
    "search_level_scales",
    "w4a8_linear",
]

FP8 = torch.float8_e4m3fn
NAMESPACE = "learned_rounding"


def _get_or_register(name: str, register):
    """Return the operator ``learned_rounding::name``; ``register(qualified_name)`` defines it if it does not exist.

    ComfyUI and a script may import the package under two names; the operator of the first import is used by both.
    """
    namespace = getattr(torch.ops, NAMESPACE)
    if not hasattr(namespace, name):
        register(f"{NAMESPACE}::{name}")
    return getattr(namespace, name).default


def _operator(name: str, schema: str, run, fake):
    """Register ``run`` as the operator ``name`` on every device; without a gradient.

    Not a ``custom_op``: one takes 26 µs more per call, and its first call imports torch's compiler (1 s, 150 MB).
    """

    def register(qualified: str) -> None:
        torch.library.define(qualified, schema, tags=torch.Tag.pt2_compliant_tag)
        torch.library.impl(qualified, "default", run)
        torch.library.register_fake(qualified, fake)
        torch.library.register_autograd(qualified, functools.partial(_refuse_backward, qualified))

    return _get_or_register(name, register)


def _refuse_backward(name: str, context, *gradients):
    raise NotImplementedError(f"{name} has no gradient; dequantize the weight for training.")


def _dispatched(name: str):
    """Function that computes an operation by the implementation for its arguments."""
    return lambda *arguments: implementation(name, *arguments)(*arguments)


def _quantize_activations_once(x, dtype, block_size, rotate_by):
    arguments = x, dtype, block_size, rotate_by
    qdata, scale = implementation("quantize_inputs", *arguments)(*arguments)(x)
    return qdata, scale.t()


def _fake_quantize_inputs(x, dtype, block_size, rotate_by):
    rows, inner = x.shape
    groups = -(-inner // block_size) if block_size else 1
    return x.new_empty(rows, inner, dtype=dtype), x.new_empty(groups, rows, dtype=torch.float32).t()


def _fake_quantize_weight(weight, dtype, block_size):
    out, inner = weight.shape
    counts = (-(-out // block_size), -(-inner // block_size)) if block_size else (out, 1)
    return weight.new_empty(out, inner, dtype=dtype), weight.new_empty(counts, dtype=torch.float32)


def _fake_scaled_linear(x, codes, scale, bias, block_size, rotate_by, out_dtype):
    check_linear(x, codes, scale, bias, block_size, rotate_by)
    return x.new_empty(*x.shape[:-1], codes.shape[0], dtype=out_dtype)


def _fake_w4a8_linear(x, codes, group_scale, scale, codebook, bias, rotate_by, out_dtype):
    check_w4a8(x, codes, group_scale, scale, codebook, bias, rotate_by)
    return x.new_empty(*x.shape[:-1], codes.shape[0], dtype=out_dtype)


_quantize_inputs = _operator(
    "quantize_inputs",
    "(Tensor x, ScalarType dtype, int block_size, int rotate_by) -> (Tensor, Tensor)",
    _quantize_activations_once,
    _fake_quantize_inputs,
)
_quantize_weight = _operator(
    "quantize_weight",
    "(Tensor weight, ScalarType dtype, int block_size) -> (Tensor, Tensor)",
    _dispatched("quantize_weight"),
    _fake_quantize_weight,
)
_dequantize_weight = _operator(
    "dequantize_weight",
    "(Tensor codes, Tensor scale, int block_size, int rotate_by, ScalarType dtype) -> Tensor",
    _dispatched("dequantize_weight"),
    lambda codes, scale, block_size, rotate_by, dtype: codes.new_empty(codes.shape, dtype=dtype),
)
_scaled_linear = _operator(
    "scaled_linear",
    "(Tensor x, Tensor codes, Tensor scale, Tensor? bias, int block_size, int rotate_by, ScalarType out_dtype) -> Tensor",
    prepared_linear,
    _fake_scaled_linear,
)
_w4a8_linear = _operator(
    "w4a8_linear",
    "(Tensor x, Tensor codes, Tensor group_scale, Tensor scale, Tensor? codebook, Tensor? bias, int rotate_by,"
    " ScalarType out_dtype) -> Tensor",
    prepared_w4a8_linear,
    _fake_w4a8_linear,
)


def _quantize_activations(x: torch.Tensor, dtype: torch.dtype, block_size: int = 0, rotate_by: int = 0):
    inner = x.shape[-1]
    qdata, scale = _quantize_inputs(x.reshape(-1, inner), dtype, block_size, rotate_by)
    return qdata.view(x.shape), scale.view(*x.shape[:-1], scale.shape[1])


def quantize_int8_row(x: torch.Tensor, *, rotate_by: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize activations to int8 with one scale per token.

    Args:
        x: (…, K) float16, bfloat16 or float32, any strides.
        rotate_by: group size of the Hadamard rotation applied first (ConvRot): 0 for none, 16, 64 or 256.

    Returns:
        qdata int8 (…, K) in ±127 and scale float32 (…, 1), with x ≈ qdata·scale; round to nearest, ties to even. The
        scale of a token that contains NaN or Inf is NaN or Inf.

    Raises:
        ValueError: the group size does not divide K.
    """
    check_rotation(x.shape[-1], rotate_by)
    return _quantize_activations(x, torch.int8, 0, rotate_by)


def quantize_fp8_row(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize activations (…, K) to float8_e4m3fn with one scale (…, 1) per token.

    As :func:`quantize_int8_row`; values are in ±448.
    """
    return _quantize_activations(x, FP8)


def quantize_int8_block(x: torch.Tensor, block_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize activations to int8 with one scale per token and ``block_size`` channels (JetFire, arXiv 2403.12422).

    Args:
        x: (…, K) float16, bfloat16 or float32, any strides; the last block of a token may be smaller.

    Returns:
        qdata int8 (…, K) and scale float32 (…, ⌈K/block_size⌉), whose memory layout is block-major.
    """
    check_block_size(block_size)
    return _quantize_activations(x, torch.int8, block_size)


def quantize_fp8_block(x: torch.Tensor, block_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize activations to float8_e4m3fn with one scale per token and ``block_size`` channels.

    As :func:`quantize_int8_block`; the scheme of DeepSeek-V3 (arXiv 2412.19437).
    """
    check_block_size(block_size)
    return _quantize_activations(x, FP8, block_size)


def quantize_int8_row_weight(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize a weight (N, K) to int8 with one scale (N, 1) per output channel; round to nearest."""
    return _quantize_weight(weight, torch.int8, 0)


def quantize_fp8_row_weight(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize a weight (N, K) to float8_e4m3fn with one scale (N, 1) per output channel; round to nearest."""
    return _quantize_weight(weight, FP8, 0)


def quantize_int8_block_weight(weight: torch.Tensor, block_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize a weight (N, K) to int8 with one scale per square block: float32 (⌈N/block_size⌉, ⌈K/block_size⌉)."""
    check_block_size(block_size)
    return _quantize_weight(weight, torch.int8, block_size)


def quantize_fp8_block_weight(weight: torch.Tensor, block_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize a weight (N, K) to float8_e4m3fn with one scale per square block, as the int8 function does."""
    check_block_size(block_size)
    return _quantize_weight(weight, FP8, block_size)


def dequantize_weight(
    codes: torch.Tensor,
    scale: torch.Tensor,
    *,
    block_size: int | None = None,
    rotate_by: int = 0,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Dequantize a weight; returns (N, K) of ``dtype``.

    Args:
        codes: quantized weight, int8 or float8_e4m3fn (N, K).
        scale: float32, () or (N, 1), or (⌈N/block_size⌉, ⌈K/block_size⌉).
        rotate_by: group size of the Hadamard rotation to undo (ConvRot); 0 for none.

    Raises:
        ValueError: shapes do not match, or both a rotation and blocks are given.
    """
    check_rotation(codes.shape[1], rotate_by, block_size or 0)
    return _dequantize_weight(codes, check_scale(codes, scale, block_size or 0), block_size or 0, rotate_by, dtype)


def scaled_linear(
    x: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    block_size: int = 0,
    rotate_by: int = 0,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Compute x·ŵᵀ + bias with a quantized weight; x is quantized to the weight's dtype and granularity.

    Args:
        x: activations (…, K), float16, bfloat16 or float32.
        codes: quantized weight, int8 or float8_e4m3fn (N, K).
        scale: float32, () or (N, 1) if ``block_size`` is 0, else (⌈N/block_size⌉, ⌈K/block_size⌉).
        bias: (N,), or None.
        rotate_by: group size of the Hadamard rotation applied to x before it is quantized (ConvRot); 0 for none.
        out_dtype: dtype of the result; None for that of x.

    Returns:
        (…, N). On a GPU without FP8 tensor cores an FP8 weight is dequantized and x is not quantized.

    Raises:
        ValueError: shapes do not match.
    """
    run = prepared_linear if _is_eager(x) else _scaled_linear
    return run(x, codes, scale, bias, block_size, rotate_by, out_dtype or x.dtype)


def _is_eager(x: torch.Tensor) -> bool:
    """Whether a call skips the dispatcher, which takes as long as a launch; tracers see an operator."""
    return type(x) is torch.Tensor and not torch.compiler.is_compiling() and not x.requires_grad


def expand_w4a8_weight(
    codes: torch.Tensor, group_scale: torch.Tensor, codebook: torch.Tensor | None = None
) -> torch.Tensor:
    """Expand a W4A8 weight to the INT8 values that are multiplied: round(level · group scale), clamped to ±127.

    Args:
        codes: 4-bit indices, one-byte dtype (N, K/2), the even column in the low four bits.
        group_scale: float8_e4m3fn or float32 (N, groups); groups are of equal length.
        codebook: level of each index, float32 (16,); None for index − 8.

    Returns:
        int8 (N, K).

    Raises:
        ValueError: shapes or dtypes do not match.
    """
    check_w4a8_weight(codes, group_scale, codebook)
    return _dispatched("expand_weight")(codes, group_scale, codebook)


def w4a8_linear(
    x: torch.Tensor,
    codes: torch.Tensor,
    group_scale: torch.Tensor,
    scale: torch.Tensor,
    codebook: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    *,
    rotate_by: int = 0,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Compute x·ŵᵀ + bias with a W4A8 weight; x is quantized to int8 per token.

    Args:
        x: activations (…, K), float16, bfloat16 or float32.
        codes, group_scale, codebook: see :func:`expand_w4a8_weight`.
        scale: float32 (N,), of the INT8 values of each output channel.
        bias: (N,), or None.
        rotate_by: group size of the Hadamard rotation applied to x before it is quantized (ConvRot); 0 for none.
        out_dtype: dtype of the result; None for that of x.

    Returns:
        (…, N).

    Raises:
        ValueError: shapes or dtypes do not match.
    """
    run = prepared_w4a8_linear if _is_eager(x) else _w4a8_linear
    return run(x, codes, group_scale, scale, codebook, bias, rotate_by, out_dtype or x.dtype)


def _typed_linear(x, qdata, scale, bias, dtype: torch.dtype, **options) -> torch.Tensor:
    check(qdata.dtype is dtype, "The quantized weight must be {}, not {}.", dtype, qdata.dtype)
    return scaled_linear(x, qdata, scale, bias, **options)


def int8_block_linear(x, codes, scale, bias=None, *, block_size: int = 128, out_dtype=None) -> torch.Tensor:
    """:func:`scaled_linear` for int8 in square blocks; activations in 1×``block_size`` (JetFire, arXiv 2403.12422)."""
    check_block_size(block_size)
    return _typed_linear(x, codes, scale, bias, torch.int8, block_size=block_size, out_dtype=out_dtype)


def fp8_block_linear(x, codes, scale, bias=None, *, block_size: int = 128, out_dtype=None) -> torch.Tensor:
    """:func:`scaled_linear` for float8_e4m3fn in square blocks (DeepSeek-V3, arXiv 2412.19437)."""
    check_block_size(block_size)
    return _typed_linear(x, codes, scale, bias, FP8, block_size=block_size, out_dtype=out_dtype)


def int8_row_linear(x, codes, scale, bias=None, *, rotate_by: int = 0, out_dtype=None) -> torch.Tensor:
    """:func:`scaled_linear` for int8, one scale per output channel or per tensor; activations per token."""
    return _typed_linear(x, codes, scale, bias, torch.int8, rotate_by=rotate_by, out_dtype=out_dtype)


def fp8_row_linear(x, codes, scale, bias=None, *, out_dtype=None) -> torch.Tensor:
    """:func:`scaled_linear` for float8_e4m3fn, one scale per output channel or per tensor; activations per token."""
    return _typed_linear(x, codes, scale, bias, FP8, out_dtype=out_dtype)


def round_block(
    weight,
    shift,
    before,
    coupling,
    scale,
    tile_rows: int,
    grid: ElementArithmetic,
    codes=None,
    level_scale=None,
    *,
    out=None,
):
    """Round a block of columns one by one with error feedback; see :func:`.reference.rounding.round_block`.

    ``tile_rows`` is the height of a scale group, ``grid`` the arithmetic of the element format.
    """
    arguments = weight, shift, before, coupling, scale, tile_rows, ElementArithmetic(*grid), codes, level_scale
    return implementation("round_block", *arguments)(*arguments, out=out)


def round_block_beam(
    weight,
    shift,
    coupling,
    column_cost,
    scale,
    group_rows: int,
    element,
    beam_width: int,
    codes=None,
    level_scale=None,
    *,
    out=None,
):
    """Round a block of columns by a beam search; see :func:`.reference.beam.round_block_beam`."""
    arguments = weight, shift, coupling, column_cost, scale, group_rows, element, beam_width, codes, level_scale
    return implementation("round_block_beam", *arguments)(*arguments, out=out)


def scale_errors(
    weight, scale, ratios, column_weight, tile_rows: int, tile_columns: int, group: int, grid: ElementArithmetic
):
    """Squared rounding errors for many candidate scales in one pass; see :func:`.reference.rounding.scale_errors`.

    ``tile_rows`` × ``tile_columns`` is the shape of a scale group, ``group`` the number of rows per sum, ``grid`` the
    arithmetic of the element format.
    """
    arguments = weight, scale, ratios, column_weight, tile_rows, tile_columns, group, ElementArithmetic(*grid)
    return implementation("scale_errors", *arguments)(*arguments)


def search_level_scales(values, bits, codes, column_weight, steps: int, largest: float):
    """The best of some E4M3 scales for levels of groups; see :func:`.reference.rounding.search_level_scales`."""
    arguments = values, bits, codes, column_weight, steps, largest
    return implementation("search_level_scales", *arguments)(*arguments)
