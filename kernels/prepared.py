"""Quantized linear layers, prepared once per shape: the implementation, its launch configuration and its compiled kernels.

A sampling step calls hundreds of linear layers, and choosing an implementation takes longer than most of them run on the
GPU. The choice is therefore kept in a dictionary, whose key has everything on which it depends.
"""

import torch

from . import backends
from .checks import check_linear, check_scale

__all__ = ["prepared_linear"]

# Every prompt length and resolution is one more shape. A cleared dictionary fills again within one step.
_MAX_KEPT = 4096
_kept: dict[tuple, object] = {}


def prepared_linear(x, qdata, scale, bias, block_size: int, rotate_by: int, out_dtype: torch.dtype) -> torch.Tensor:
    """See :func:`.operators.scaled_linear`."""
    if not x.is_contiguous():
        x = x.contiguous()
    if not qdata.is_contiguous():
        qdata = qdata.contiguous()
    if scale.dtype is not torch.float32 or not scale.is_contiguous():
        scale = scale.float().contiguous()
    addresses = x.data_ptr() | qdata.data_ptr() | scale.data_ptr()
    if bias is not None:
        addresses |= bias.data_ptr()
    key = (
        backends.backend(), addresses & 15 == 0, x.shape, x.dtype, x.device, qdata.shape, qdata.dtype, scale.shape,
        bias if bias is None else bias.dtype, block_size, rotate_by, out_dtype,
    )  # fmt: skip
    linear = _kept.get(key)
    if linear is None:
        linear = _prepare(key, x, qdata, scale, bias, block_size, rotate_by, out_dtype)
    return linear(x, qdata, scale, bias)


def _prepare(key: tuple, x, qdata, scale, bias, block_size: int, rotate_by: int, out_dtype: torch.dtype):
    """Prepare the function of (x, qdata, scale, bias) for a key, and keep it."""
    check_linear(x, qdata, scale, bias, block_size, rotate_by)
    shape = x.shape
    arguments = (
        x.view(-1, shape[-1]),
        qdata,
        check_scale(qdata, scale, block_size),
        bias,
        block_size,
        rotate_by,
        out_dtype,
    )
    aligned = key[1]
    linear = backends.implementation("scaled_linear", *arguments)(*arguments, keep=aligned)
    if len(shape) != 2:
        linear = _flatten_tokens(linear, shape, qdata.shape[0])
    if not (x.is_cuda and torch.cuda.is_current_stream_capturing()):  # nothing is measured during a capture
        if len(_kept) >= _MAX_KEPT:
            _kept.clear()
        _kept[key] = linear
    return linear


def _flatten_tokens(linear, shape: torch.Size, columns: int):
    """``linear`` for activations of ``shape``, of which it gets the matrix (M, K)."""
    flat, outputs = (shape[:-1].numel(), shape[-1]), (*shape[:-1], columns)
    return lambda x, qdata, scale, bias: linear(x.view(flat), qdata, scale, bias).view(outputs)
