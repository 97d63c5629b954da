"""Linear layers of 8-bit codes on torch's own matrix products: ``_int_mm`` and ``_scaled_mm``, which run cuBLAS."""

import torch

from . import cards

__all__ = ["NEEDS", "scaled_linear"]


def _scaled_mm_of_blocks():
    """torch's product of block-scaled FP8 (torch 2.10 and CUDA 12.9), or None."""
    return getattr(torch.nn.functional, "scaled_mm", None)


def _product_exists(x, codes, scale, bias, block_size, *_) -> bool:
    if codes.dtype is torch.int8:
        return not block_size
    if block_size:
        return block_size == 128 and cards.capability(x.device) == (9, 0) and _scaled_mm_of_blocks() is not None
    return cards.multiplies_fp8(x.device)


def _shape_fits(x, codes, scale, bias, block_size, *_) -> bool:
    step = block_size or 16
    return x.shape[0] > 16 and codes.shape[0] % step == 0 and codes.shape[1] % step == 0


# What this needs: (a sentence for people, a test of the operation's arguments).
NEEDS = (
    ("torch has no product of this format on this card", _product_exists),
    ("torch's products take more than 16 tokens, and sides that are multiples of 16 (of 128 for blocks)", _shape_fits),
)


def scaled_linear(x, codes, scale, bias, block_size: int, rotate_by: int, out_dtype: torch.dtype) -> torch.Tensor:
    """See :func:`..scaled_linear`."""
    inputs, input_scale = torch.ops.learned_rounding.quantize_inputs(x, codes.dtype, block_size, rotate_by)
    if codes.dtype is torch.int8:
        product = torch._int_mm(inputs, codes.t()).float().mul_(input_scale).mul_(scale.reshape(1, -1))
    elif block_size:
        from torch.nn.functional import ScalingType

        product = _scaled_mm_of_blocks()(
            inputs,
            codes.t(),
            input_scale,
            ScalingType.BlockWise1x128,
            scale.t(),
            ScalingType.BlockWise128x128,
            output_dtype=torch.bfloat16,
        )
    else:
        row = scale.reshape(1, -1).expand(1, codes.shape[0]).contiguous()
        product = torch._scaled_mm(inputs, codes.t(), input_scale.contiguous(), row, out_dtype=torch.bfloat16)
    return (product if bias is None else product + bias).to(out_dtype)
