"""The kernels as torch operators, which torch.compile and CUDA graphs take as they are; and their public names."""

import torch

from .backends import implementation
from .grid import GridArithmetic

__all__ = [
    "dequantize_weight",
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
    "scale_errors",
    "scaled_linear",
]

FP8 = torch.float8_e4m3fn
NAMESPACE = "learned_rounding"


def _operator(name: str, register):
    """The operator ``learned_rounding::name``, which ``register(its full name)`` makes.

    The package may be imported under more than one name, by ComfyUI and by a script: the first one's operator stays.
    """
    known = getattr(torch.ops, NAMESPACE)
    if not hasattr(known, name):
        register(f"{NAMESPACE}::{name}")
    return getattr(known, name).default


def _of_layers(name: str, schema: str, fake):
    """An operator of models that run: torch.compile meets it, and autograd is refused."""

    def run(*arguments):
        return implementation(name, *arguments)(*arguments)

    def register(full: str) -> None:
        torch.library.custom_op(full, run, mutates_args=(), schema=schema).register_fake(fake)

    return _operator(name, register)


def _of_rounding(name: str, schema: str, fake):
    """An operator of files that are quantized, whose last three arguments are a grid's numbers.

    A ``custom_op`` loads torch's compiler when it is first called: a second and 150 MB, for nothing here.
    """

    def run(*arguments):
        arguments = *arguments[:-3], GridArithmetic(*arguments[-3:])
        return implementation(name, *arguments)(*arguments)

    def register(full: str) -> None:
        torch.library.define(full, schema, tags=torch.Tag.pt2_compliant_tag)
        torch.library.impl(full, "default", run)
        torch.library.register_fake(full, fake)

    return _operator(name, register)


def _fake_quantize_inputs(x, dtype, block_size, rotate_by):
    rows, inner = x.shape
    groups = -(-inner // block_size) if block_size else 1
    return x.new_empty(rows, inner, dtype=dtype), x.new_empty(groups, rows, dtype=torch.float32).t()


def _fake_quantize_weight(weight, dtype, block_size):
    out, inner = weight.shape
    counts = (-(-out // block_size), -(-inner // block_size)) if block_size else (out, 1)
    return weight.new_empty(out, inner, dtype=dtype), weight.new_empty(counts, dtype=torch.float32)


_quantize_inputs = _of_layers(
    "quantize_inputs",
    "(Tensor x, ScalarType dtype, int block_size, int rotate_by) -> (Tensor, Tensor)",
    _fake_quantize_inputs,
)
_quantize_weight = _of_layers(
    "quantize_weight",
    "(Tensor weight, ScalarType dtype, int block_size) -> (Tensor, Tensor)",
    _fake_quantize_weight,
)
_dequantize_weight = _of_layers(
    "dequantize_weight",
    "(Tensor codes, Tensor scale, int block_size, int rotate_by, ScalarType dtype) -> Tensor",
    lambda codes, scale, block_size, rotate_by, dtype: codes.new_empty(codes.shape, dtype=dtype),
)
_scaled_linear = _of_layers(
    "scaled_linear",
    "(Tensor x, Tensor codes, Tensor scale, Tensor? bias, int block_size, int rotate_by, ScalarType out_dtype) -> Tensor",
    lambda x, codes, scale, bias, block_size, rotate_by, out_dtype: x.new_empty(
        x.shape[0], codes.shape[0], dtype=out_dtype
    ),
)
_round_block = _of_rounding(
    "round_block",
    "(Tensor weight, Tensor shift, Tensor? before, Tensor? coupling, Tensor scale, int tile_rows,"
    " int mantissa, float smallest, float largest) -> (Tensor, Tensor)",
    lambda weight, *_: (weight.new_empty(weight.shape, dtype=torch.float16), torch.empty_like(weight)),
)
_scale_errors = _of_rounding(
    "scale_errors",
    "(Tensor weight, Tensor scale, Tensor ratios, Tensor? column_weight, int tile_rows, int tile_columns, int group,"
    " int mantissa, float smallest, float largest) -> Tensor",
    lambda weight, scale, ratios, column_weight, tile_rows, tile_columns, group, *_: scale.new_empty(
        ratios.shape[0], -(-weight.shape[0] // group), scale.shape[1]
    ),
)


def _check(condition: bool, what: str, *values) -> None:
    if not condition:
        raise ValueError(what.format(*values))


def _check_block_size(block_size: int) -> None:
    _check(
        isinstance(block_size, int) and block_size > 0,
        "The block size must be a positive integer, not {!r}.",
        block_size,
    )


def _check_rotation(inner: int, rotate_by: int, block_size: int = 0) -> None:
    _check(
        not (rotate_by and block_size),
        "Rotated channels are scaled per row or tensor; leave out rotate_by or block_size.",
    )
    _check(rotate_by in (0, 16, 64, 256), "A rotation has groups of 16, 64 or 256 channels, not {}.", rotate_by)
    _check(not rotate_by or inner % rotate_by == 0, "Groups of {} do not divide {} channels.", rotate_by, inner)


def _quantized(x: torch.Tensor, dtype: torch.dtype, block_size: int = 0, rotate_by: int = 0):
    inner = x.shape[-1]
    codes, scale = _quantize_inputs(x.reshape(-1, inner), dtype, block_size, rotate_by)
    return codes.view(x.shape), scale.view(*x.shape[:-1], scale.shape[1])


def quantize_int8_row(x: torch.Tensor, *, rotate_by: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 codes of inputs, one scale per token.

    Args:
        x: (…, K) float16, bfloat16 or float32, any strides.
        rotate_by: rotate groups of so many channels first (ConvRot): 0 for none, 16, 64 or 256.

    Returns:
        codes (…, K), and scale float32 (…, 1), with x ≈ codes·scale; ties go to even, codes lie in ±127. A token
        with NaN or Inf gets such a scale.

    Raises:
        ValueError: groups that do not divide K.
    """
    _check_rotation(x.shape[-1], rotate_by)
    return _quantized(x, torch.int8, 0, rotate_by)


def quantize_fp8_row(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """float8_e4m3fn codes of inputs (…, K), one scale (…, 1) per token; as :func:`quantize_int8_row`, codes lie in ±448."""
    return _quantized(x, FP8)


def quantize_int8_block(x: torch.Tensor, block_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 codes of inputs, one scale per token and ``block_size`` channels (JetFire, arXiv 2403.12422).

    Args:
        x: (…, K) float16, bfloat16 or float32, any strides; the last block of a token may be smaller.

    Returns:
        codes (…, K), and scale float32 (…, ⌈K/block_size⌉), which lies in memory block by block.
    """
    _check_block_size(block_size)
    return _quantized(x, torch.int8, block_size)


def quantize_fp8_block(x: torch.Tensor, block_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """float8_e4m3fn codes of inputs, one scale per token and ``block_size`` channels (DeepSeek-V3, arXiv 2412.19437)."""
    _check_block_size(block_size)
    return _quantized(x, FP8, block_size)


def quantize_int8_row_weight(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 codes (N, K) of a weight, one scale (N, 1) per output channel; rounded to nearest."""
    return _quantize_weight(weight, torch.int8, 0)


def quantize_fp8_row_weight(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """float8_e4m3fn codes (N, K) of a weight, one scale (N, 1) per output channel; rounded to nearest."""
    return _quantize_weight(weight, FP8, 0)


def quantize_int8_block_weight(weight: torch.Tensor, block_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 codes (N, K) of a weight, one scale per square block: float32 (⌈N/block_size⌉, ⌈K/block_size⌉)."""
    _check_block_size(block_size)
    return _quantize_weight(weight, torch.int8, block_size)


def quantize_fp8_block_weight(weight: torch.Tensor, block_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """float8_e4m3fn codes (N, K) of a weight, one scale per square block: float32 (⌈N/block_size⌉, ⌈K/block_size⌉)."""
    _check_block_size(block_size)
    return _quantize_weight(weight, FP8, block_size)


def _checked_scale(codes: torch.Tensor, scale: torch.Tensor, block_size: int) -> torch.Tensor:
    """The scale as kernels take it: (N, 1) or (1, 1), or a grid of blocks; ValueError where it does not fit the codes."""
    out, inner = codes.shape
    if block_size:
        wanted = -(-out // block_size), -(-inner // block_size)
        _check(
            scale.shape == wanted,
            "Codes {} in blocks of {} need a scale {}, not {}.",
            tuple(codes.shape),
            block_size,
            wanted,
            tuple(scale.shape),
        )
        return scale
    _check(
        scale.numel() in (1, out),
        "Codes {} need one scale or one a row, not {}.",
        tuple(codes.shape),
        tuple(scale.shape),
    )
    return scale.reshape(-1, 1)


def dequantize_weight(
    codes: torch.Tensor,
    scale: torch.Tensor,
    *,
    block_size: int | None = None,
    rotate_by: int = 0,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """What codes mean: (N, K) of ``dtype``.

    Args:
        codes: int8 or float8_e4m3fn (N, K).
        scale: float32, () or (N, 1), or (⌈N/block_size⌉, ⌈K/block_size⌉).
        rotate_by: groups of input channels that are rotated back (ConvRot); 0 for none.

    Raises:
        ValueError: shapes that do not fit, or a rotation of blocks.
    """
    _check_rotation(codes.shape[1], rotate_by, block_size or 0)
    return _dequantize_weight(codes, _checked_scale(codes, scale, block_size or 0), block_size or 0, rotate_by, dtype)


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
    """x·ŵᵀ + bias, where x is quantized as it comes in, to the numbers of the codes and with scales as fine as theirs.

    Args:
        x: (…, K) float16, bfloat16 or float32.
        codes: int8 or float8_e4m3fn (N, K).
        scale: float32, () or (N, 1) where ``block_size`` is 0, else (⌈N/block_size⌉, ⌈K/block_size⌉).
        bias: (N,), or None.
        rotate_by: groups of input channels that are rotated before they are quantized (ConvRot); 0 for none.
        out_dtype: that of x where None.

    Returns:
        (…, N). On cards without FP8 arithmetic an FP8 weight is decoded, and x is not quantized.

    Raises:
        ValueError: shapes that do not fit.
    """
    _check(x.shape[-1] == codes.shape[1], "{} channels do not fit codes {}.", x.shape[-1], tuple(codes.shape))
    _check(bias is None or bias.shape == codes.shape[:1], "A bias does not fit codes {}.", tuple(codes.shape))
    _check_rotation(codes.shape[1], rotate_by, block_size)
    scale = _checked_scale(codes, scale, block_size)
    flat = x.reshape(-1, x.shape[-1])
    out = _scaled_linear(flat, codes, scale, bias, block_size, rotate_by, out_dtype or x.dtype)
    return out.view(*x.shape[:-1], codes.shape[0])


def _linear(x, codes, scale, bias, dtype: torch.dtype, **options) -> torch.Tensor:
    _check(codes.dtype is dtype, "Codes must be {}, not {}.", dtype, codes.dtype)
    return scaled_linear(x, codes, scale, bias, **options)


def int8_block_linear(x, codes, scale, bias=None, *, block_size: int = 128, out_dtype=None) -> torch.Tensor:
    """:func:`scaled_linear` with int8 codes in square blocks, inputs in 1×``block_size`` (JetFire, arXiv 2403.12422)."""
    _check_block_size(block_size)
    return _linear(x, codes, scale, bias, torch.int8, block_size=block_size, out_dtype=out_dtype)


def fp8_block_linear(x, codes, scale, bias=None, *, block_size: int = 128, out_dtype=None) -> torch.Tensor:
    """:func:`scaled_linear` with float8_e4m3fn codes in square blocks (DeepSeek-V3, arXiv 2412.19437)."""
    _check_block_size(block_size)
    return _linear(x, codes, scale, bias, FP8, block_size=block_size, out_dtype=out_dtype)


def int8_row_linear(x, codes, scale, bias=None, *, rotate_by: int = 0, out_dtype=None) -> torch.Tensor:
    """:func:`scaled_linear` with int8 codes, one scale per output channel or one at all, inputs per token."""
    return _linear(x, codes, scale, bias, torch.int8, rotate_by=rotate_by, out_dtype=out_dtype)


def fp8_row_linear(x, codes, scale, bias=None, *, out_dtype=None) -> torch.Tensor:
    """:func:`scaled_linear` with float8_e4m3fn codes, one scale per output channel or one at all, inputs per token."""
    return _linear(x, codes, scale, bias, FP8, out_dtype=out_dtype)


def round_block(weight, shift, before, coupling, scale, tile_rows: int, grid: GridArithmetic):
    """Round a block of columns one after the other, feeding each column's error to the others; see :mod:`.reference`."""
    return _round_block(weight, shift, before, coupling, scale, tile_rows, *grid)


def scale_errors(
    weight, scale, ratios, column_weight, tile_rows: int, tile_columns: int, group: int, grid: GridArithmetic
):
    """Squared rounding errors under many candidate scales in one pass; see :mod:`.reference`."""
    return _scale_errors(weight, scale, ratios, column_weight, tile_rows, tile_columns, group, *grid)
