"""8-bit linear layers in plain torch."""

import functools
from collections.abc import Callable

import torch

from .. import devices
from ..hadamard import rotate
from .quantize import dequantize_weight, quantize_inputs

__all__ = ["compute_linear", "prepare_linear"]


def _fake_quantize(x, dtype: torch.dtype, block_size: int, rotate_by: int) -> torch.Tensor:
    """Quantize activations to ``dtype`` and dequantize them; float32."""
    qdata, scale = quantize_inputs(x, dtype, block_size, rotate_by)
    if block_size:
        scale = scale.repeat_interleave(block_size, 1)[:, : x.shape[1]]
    return qdata.float() * scale


def compute_linear(x, qdata, scale, bias, block_size: int, rotate_by: int, out_dtype: torch.dtype) -> torch.Tensor:
    """Compute :func:`...operators.scaled_linear` from dequantized operands, in float32 (GPU: dtype of x)."""
    dtype = x.dtype if x.is_cuda else torch.float32
    if qdata.dtype is torch.int8 or devices.has_fp8_matmul(x.device):
        activations = _fake_quantize(x, qdata.dtype, block_size, rotate_by)
    else:
        activations = rotate(x, rotate_by) if rotate_by else x
    weight = dequantize_weight(qdata, scale, block_size, 0, dtype)
    bias = None if bias is None else bias.to(dtype)
    return torch.nn.functional.linear(activations.to(dtype), weight, bias).to(out_dtype)


def prepare_linear(
    x, qdata, scale, bias, block_size: int, rotate_by: int, out_dtype: torch.dtype, keep: bool = True
) -> Callable[..., torch.Tensor]:
    """Function of (x, qdata, scale, bias) that computes :func:`...operators.scaled_linear` in plain torch.

    It dequantizes both operands and multiplies in float32 (GPU: dtype of x). The other parameters are those of
    :func:`..triton.linear.prepare_linear`.
    """
    return functools.partial(compute_linear, block_size=block_size, rotate_by=rotate_by, out_dtype=out_dtype)
