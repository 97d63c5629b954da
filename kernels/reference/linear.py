"""Linear layers of 8-bit codes, in plain torch."""

import torch

from .quantize import dequantize_weight, quantize_inputs

__all__ = ["scaled_linear"]


def scaled_linear(x, codes, scale, bias, block_size: int, rotate_by: int, out_dtype: torch.dtype) -> torch.Tensor:
    """See :func:`...scaled_linear`: what the codes of both sides mean is multiplied, in float32 on a CPU, as x on a GPU."""
    dtype = x.dtype if x.is_cuda else torch.float32
    input_codes, input_scale = quantize_inputs(x, codes.dtype, block_size, rotate_by)
    if block_size:
        input_scale = input_scale.repeat_interleave(block_size, 1)[:, : x.shape[1]]
    inputs = (input_codes.float() * input_scale).to(dtype)
    weight = dequantize_weight(codes, scale, block_size, 0, dtype)
    return torch.nn.functional.linear(inputs, weight, None if bias is None else bias.to(dtype)).to(out_dtype)
