"""Quantized linear layers, prepared once per shape: the implementation, its launch configuration and its compiled kernels.

A sampling step calls hundreds of linear layers, and choosing an implementation takes longer than most of them run on the
GPU. The choice is therefore kept in a dictionary, whose key has everything on which it depends.
"""

import functools
import logging
from collections.abc import Callable

import torch

from . import backends, devices
from .checks import check, check_linear, check_scale, check_w4a8

__all__ = ["KeptFunctions", "fp8_static_linear", "has_static_fp8", "prepared_linear", "prepared_w4a8_linear"]

log = logging.getLogger(__name__)


class KeptFunctions(dict[tuple, Callable[..., torch.Tensor]]):
    """Functions by shape. Every prompt length and resolution adds some; a cleared dictionary fills again within one step."""

    limit = 4096

    def keep(self, key: tuple, function: Callable[..., torch.Tensor]) -> None:
        """Add a function, after clearing a full dictionary."""
        if len(self) >= self.limit:
            self.clear()
        self[key] = function


_kept = KeptFunctions()


def prepared_linear(x, qdata, scale, bias, block_size: int, rotate_by: int, out_dtype: torch.dtype) -> torch.Tensor:
    """See :func:`.operators.scaled_linear`."""
    if _is_on_other_gpu(x):
        with torch.cuda.device(x.device):
            return prepared_linear(x, qdata, scale, bias, block_size, rotate_by, out_dtype)
    if not x.is_contiguous():
        x = x.contiguous()
    if not qdata.is_contiguous():
        qdata = qdata.contiguous()
    if scale.dtype is not torch.float32 or not scale.is_contiguous():
        scale = scale.float().contiguous()
    weight_address = qdata.data_ptr()
    addresses = x.data_ptr() | weight_address | scale.data_ptr()
    if bias is not None:
        if not bias.is_contiguous():
            bias = bias.contiguous()
        addresses |= bias.data_ptr()
    key = (
        backends.backend(), addresses & 15 == 0, weight_address & 15 == 0, x.shape, x.dtype, x.device, qdata.shape, qdata.dtype, scale.shape,
        bias if bias is None else bias.dtype, block_size, rotate_by, out_dtype,
    )  # fmt: skip
    linear = _kept.get(key)
    if linear is None:
        linear = _prepare(key, x, qdata, scale, bias, block_size, rotate_by, out_dtype)
    return linear(x, qdata, scale, bias)


def _is_on_other_gpu(x: torch.Tensor) -> bool:
    """Whether ``x`` is on a GPU that is not the current one: Triton launches on the current one."""
    return x.is_cuda and x.get_device() != torch.cuda.current_device()


def _prepare(key: tuple, x, qdata, scale, bias, block_size: int, rotate_by: int, out_dtype: torch.dtype):
    """Prepare the function of (x, qdata, scale, bias) for a key, and keep it."""
    check_linear(x, qdata, scale, bias, block_size, rotate_by)
    arguments = (
        x.view(-1, x.shape[-1]),
        qdata,
        check_scale(qdata, scale, block_size),
        bias,
        block_size,
        rotate_by,
        out_dtype,
    )
    aligned = key[1]
    linear = backends.implementation("scaled_linear", *arguments)(*arguments, keep=aligned)
    return _keep_linear(key, linear, x, qdata.shape[0])


def _keep_linear(key: tuple, linear, x: torch.Tensor, columns: int):
    """Keep and return a function of activations (M, K) and other tensors, for activations of the shape of ``x``."""
    if x.dim() != 2:
        linear = _flatten_tokens(linear, x.shape, columns)
    if not (x.is_cuda and torch.cuda.is_current_stream_capturing()):  # nothing is measured during a capture
        _kept.keep(key, linear)
    return linear


def _flatten_tokens(linear, shape: torch.Size, columns: int):
    """``linear`` for activations of ``shape``, of which it gets the matrix (M, K)."""
    flat, outputs = (shape[:-1].numel(), shape[-1]), (*shape[:-1], columns)
    return lambda x, *tensors: linear(x.view(flat), *tensors).view(outputs)


def prepared_w4a8_linear(
    x, qdata, group_scale, scale, codebook, bias, rotate_by: int, out_dtype: torch.dtype
) -> torch.Tensor:
    """See :func:`.operators.w4a8_linear`."""
    if _is_on_other_gpu(x):
        with torch.cuda.device(x.device):
            return prepared_w4a8_linear(x, qdata, group_scale, scale, codebook, bias, rotate_by, out_dtype)
    x, qdata, group_scale, scale = x.contiguous(), qdata.contiguous(), group_scale.contiguous(), scale.contiguous()
    if qdata.data_ptr() % 8:
        qdata = qdata.clone()
    addresses = x.data_ptr() | qdata.data_ptr() | group_scale.data_ptr() | scale.data_ptr()
    if codebook is not None:
        codebook = codebook.contiguous()
        addresses |= codebook.data_ptr()
    if bias is not None:
        bias = bias.contiguous()
        addresses |= bias.data_ptr()
    key = (
        "w4a8", backends.backend(), addresses & 15 == 0, x.shape, x.dtype, x.device, qdata.shape, group_scale.shape,
        group_scale.dtype, scale.shape, codebook if codebook is None else codebook.shape,
        bias if bias is None else bias.dtype, rotate_by, out_dtype,
    )  # fmt: skip
    linear = _kept.get(key)
    if linear is None:
        linear = _prepare_w4a8(key, x, qdata, group_scale, scale, codebook, bias, rotate_by, out_dtype)
    return linear(x, qdata, group_scale, scale, codebook, bias)


def _prepare_w4a8(key: tuple, x, qdata, group_scale, scale, codebook, bias, rotate_by: int, out_dtype: torch.dtype):
    """As :func:`_prepare`, for W4A8 weights."""
    check_w4a8(x, qdata, group_scale, scale, codebook, bias, rotate_by)
    arguments = x.view(-1, x.shape[-1]), qdata, group_scale, scale, codebook, bias, rotate_by, out_dtype
    linear = backends.implementation("w4a8_linear", *arguments)(*arguments, keep=key[2])
    return _keep_linear(key, linear, x, qdata.shape[0])


def has_static_fp8(x: torch.Tensor, qdata: torch.Tensor, scale: torch.Tensor, input_scale=None) -> bool:
    """Whether :func:`fp8_static_linear` runs for these arguments: NVIDIA from SM 8.9 on, with Triton."""
    return (
        x.is_cuda
        and x.dtype in (torch.bfloat16, torch.float16)
        and qdata.shape[0] % 16 == 0
        and qdata.shape[1] % 16 == 0
        and _is_static_scale(scale, x)
        and (input_scale is None or _is_static_scale(input_scale, x))
        and _can_run_fp8(x.device)
    )


def _is_static_scale(scale: torch.Tensor, x: torch.Tensor) -> bool:
    return scale.dtype is torch.float32 and scale.numel() == 1 and scale.device == x.device


@functools.cache
def _can_run_fp8(device: torch.device) -> bool:
    """Whether a small layer runs: Triton needs a C compiler, and some builds of torch lack the product."""
    if not (devices.is_nvidia() and devices.compute_capability(device) >= (8, 9) and backends.has_triton()):
        return False
    x = torch.ones(32, 32, dtype=torch.bfloat16, device=device)
    try:
        fp8_static_linear(x, x.to(torch.float8_e4m3fn), _unit_scale(device))
    except Exception as error:  # any error of a compiler
        log.warning("FP8 layers do not run on this pack's kernels, because a test of them fails: %s", error)
        return False
    return True


@functools.cache
def _unit_scale(device: torch.device) -> torch.Tensor:
    return torch.ones((), device=device)


def fp8_static_linear(x, qdata, scale, input_scale=None, bias=None) -> torch.Tensor:
    """Compute x·ŵᵀ + bias with a float8_e4m3fn weight; x is quantized with a given scale, by cuBLAS from SM 8.9 on.

    Args:
        x: activations (…, K), float16 or bfloat16; see :func:`has_static_fp8`.
        qdata: float8_e4m3fn (N, K).
        scale: float32 with one value.
        input_scale: scale of the activations, float32 with one value; None for 1. Larger activations are clamped.
        bias: (N,) of the dtype of x, or None.

    Returns:
        (…, N) in the dtype of x.

    Raises:
        ValueError: shapes do not match.
    """
    if _is_on_other_gpu(x):
        with torch.cuda.device(x.device):
            return fp8_static_linear(x, qdata, scale, input_scale, bias)
    if not x.is_contiguous():
        x = x.contiguous()
    if input_scale is None:
        input_scale = _unit_scale(x.device)
    aligned = (x.data_ptr() | input_scale.data_ptr()) & 15 == 0
    key = "static", aligned, x.shape, x.dtype, x.device, qdata.shape, scale.shape, input_scale.dtype
    quantize = _kept.get(key)
    if quantize is None:
        check_linear(x, qdata, scale, bias, 0, 0)
        check(scale.numel() == 1, "A static FP8 layer needs one weight scale, not {}.", scale.numel())
        from .triton import prepare_static_quantizer

        quantize = prepare_static_quantizer(x.view(-1, x.shape[-1]), keep=aligned)
        _kept.keep(key, quantize)
    product = torch._scaled_mm(  # pyright: ignore[reportPrivateImportUsage]
        quantize(x, input_scale), qdata.t(), input_scale, scale, bias=bias, out_dtype=x.dtype
    )
    return product if x.dim() == 2 else product.view(*x.shape[:-1], qdata.shape[0])
