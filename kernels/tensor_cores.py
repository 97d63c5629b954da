"""8-bit linear layers on torch's matrix products ``_int_mm`` and ``_scaled_mm``, which call cuBLAS."""

import torch

from . import devices

__all__ = ["NEEDS", "scaled_linear"]


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


def scaled_linear(x, qdata, scale, bias, block_size: int, rotate_by: int, out_dtype: torch.dtype) -> torch.Tensor:
    """See :func:`..operators.scaled_linear`."""
    activations, input_scale = torch.ops.learned_rounding.quantize_inputs(x, qdata.dtype, block_size, rotate_by)
    if qdata.dtype is torch.int8:
        product = torch._int_mm(activations, qdata.t()).float().mul_(input_scale).mul_(scale.reshape(1, -1))  # pyright: ignore[reportPrivateImportUsage]
    elif block_size:
        from torch.nn.functional import ScalingType, scaled_mm

        product = scaled_mm(
            activations,
            qdata.t(),
            input_scale,
            ScalingType.BlockWise1x128,
            scale.t(),
            ScalingType.BlockWise128x128,
            output_dtype=torch.bfloat16,
        )
    else:
        row = scale.reshape(1, -1).expand(1, qdata.shape[0]).contiguous()
        product = torch._scaled_mm(activations, qdata.t(), input_scale.contiguous(), row, out_dtype=torch.bfloat16)  # pyright: ignore[reportPrivateImportUsage]
    return (product if bias is None else product + bias).to(out_dtype)
