"""Linear layers of 8-bit codes, in plain torch."""

import torch

from .. import cards
from ..hadamard import rotate
from .quantize import dequantize_weight, quantize_inputs

__all__ = ["scaled_linear"]


def _meaning(x, dtype: torch.dtype, block_size: int, rotate_by: int) -> torch.Tensor:
    """What codes of ``dtype`` of the inputs mean."""
    codes, scale = quantize_inputs(x, dtype, block_size, rotate_by)
    if block_size:
        scale = scale.repeat_interleave(block_size, 1)[:, : x.shape[1]]
    return codes.float() * scale


def scaled_linear(x, codes, scale, bias, block_size: int, rotate_by: int, out_dtype: torch.dtype) -> torch.Tensor:
    """See :func:`...scaled_linear`: what the codes of both sides mean is multiplied, in float32 on a CPU, as x on a GPU."""
    dtype = x.dtype if x.is_cuda else torch.float32
    if codes.dtype is torch.int8 or cards.multiplies_fp8(x.device):
        inputs = _meaning(x, codes.dtype, block_size, rotate_by)
    else:
        inputs = rotate(x, rotate_by) if rotate_by else x
    weight = dequantize_weight(codes, scale, block_size, 0, dtype)
    bias = None if bias is None else bias.to(dtype)
    return torch.nn.functional.linear(inputs.to(dtype), weight, bias).to(out_dtype)
