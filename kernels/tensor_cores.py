"""8-bit linear layers on torch's matrix products ``_int_mm`` and ``_scaled_mm``, which call cuBLAS."""

import torch

from . import devices

__all__ = ["NEEDS", "prepare_linear"]


def _has_block_scaled_mm() -> bool:
    """Whether torch has a block-scaled FP8 product (torch 2.10 with CUDA 12.9)."""
    return hasattr(torch.nn.functional, "scaled_mm")


def _product_exists(x, qdata, scale, bias, block_size, *_) -> bool:
    if qdata.dtype is torch.int8:
        return not block_size
    if block_size:
        return block_size == 128 and devices.compute_capability(x.device) == (9, 0) and _has_block_scaled_mm()
    return devices.has_fp8_matmul(x.device)


def _shape_fits(x, qdata, scale, bias, block_size, *_) -> bool:
    step = block_size or 16
    return x.shape[0] > 16 and qdata.shape[0] % step == 0 and qdata.shape[1] % step == 0


# Requirements: (message if unmet, predicate over the operation's arguments).
NEEDS = (
    ("torch has no product of this format on this GPU", _product_exists),
    ("torch's products need more than 16 tokens and sides divisible by 16 (by 128 for blocks)", _shape_fits),
)


def prepare_linear(x, qdata, scale, bias, block_size: int, rotate_by: int, out_dtype: torch.dtype, keep: bool = True):
    """As :func:`.triton.linear.prepare_linear`, with torch's products."""
    from . import backends  # which has this function in its table

    quantizing = x, qdata.dtype, block_size, rotate_by
    quantize = backends.implementation("quantize_inputs", *quantizing)(*quantizing, keep=keep)
    multiply = _multiply_int8 if qdata.dtype is torch.int8 else _multiply_blocks if block_size else _multiply_rows

    def linear(x, qdata, scale, bias) -> torch.Tensor:
        activations, input_scale = quantize(x)
        return multiply(activations, input_scale.t(), qdata.t(), scale, bias, out_dtype)

    return linear


def _multiply_int8(x, input_scale, weight, scale, bias, out_dtype: torch.dtype) -> torch.Tensor:
    """Product of int8 x (M, K) and ``weight`` (K, N), scaled in float32."""
    product = torch._int_mm(x, weight).float().mul_(input_scale).mul_(scale.reshape(1, -1))  # pyright: ignore[reportPrivateImportUsage]
    return (product if bias is None else product.add_(bias)).to(out_dtype)


def _multiply_rows(x, input_scale, weight, scale, bias, out_dtype: torch.dtype) -> torch.Tensor:
    """Product of float8_e4m3fn x (M, K) and ``weight`` (K, N) with one scale per row of x and column of ``weight``."""
    columns = weight.shape[1]
    scale = scale.view(1, -1) if scale.numel() == columns else scale.view(1, 1).expand(1, columns).contiguous()
    fused = bias is not None and bias.dtype is torch.bfloat16  # the product adds a bias of its own output dtype
    product = torch._scaled_mm(  # pyright: ignore[reportPrivateImportUsage]
        x, weight, input_scale, scale, bias=bias if fused else None, out_dtype=torch.bfloat16
    )
    return (product if bias is None or fused else product + bias).to(out_dtype)


def _multiply_blocks(x, input_scale, weight, scale, bias, out_dtype: torch.dtype) -> torch.Tensor:
    """Product of float8_e4m3fn x (M, K) in blocks of 1×128 and ``weight`` (K, N) in blocks of 128×128."""
    from torch.nn.functional import ScalingType, scaled_mm

    recipes = ScalingType.BlockWise1x128, ScalingType.BlockWise128x128
    product = scaled_mm(x, weight, input_scale, recipes[0], scale.t(), recipes[1], output_dtype=torch.bfloat16)
    return (product if bias is None else product + bias).to(out_dtype)
