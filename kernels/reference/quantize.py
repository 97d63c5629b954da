"""Quantize activations and weights to 8 bits, and dequantize weights, in plain torch."""

import torch

from ..hadamard import rotate

__all__ = ["LARGEST", "SMALLEST_AMAX", "dequantize_weight", "prepare_quantizer", "quantize_inputs", "quantize_weight"]

# Largest magnitude of a quantized value. int8 is symmetric: −128 is not used.
LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
# Lower bound of a scale group's absolute maximum. Without it a group of zeros would have the scale 0 and an infinite inverse.
SMALLEST_AMAX = 2.0**-100


def _quantize_groups(
    groups: torch.Tensor, dims: tuple[int, ...], dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize float32 ``groups`` with one scale over ``dims`` (kept with size 1); round to nearest, ties to even.

    The scale of a group that contains NaN or Inf is NaN or Inf, which propagates to every result.
    """
    amax = groups.abs().amax(dims, keepdim=True).clamp_min(SMALLEST_AMAX)
    largest = torch.full_like(
        amax, LARGEST[dtype]
    )  # torch replaces division by a number by a reciprocal: two roundings
    scaled = (groups * (largest / amax)).nan_to_num_(0.0).clamp_(-LARGEST[dtype], LARGEST[dtype])
    return (scaled.round_() if dtype is torch.int8 else scaled).to(dtype), amax / largest


def quantize_inputs(x: torch.Tensor, dtype: torch.dtype, block_size: int, rotate_by: int):
    """Quantize activations; the operator behind :func:`...operators.quantize_int8_row` and its siblings.

    Args:
        x: (M, K), any float dtype.
        dtype: int8 or float8_e4m3fn.
        block_size: channels per scale; 0 for one scale per token.
        rotate_by: group size of the Hadamard rotation applied first; 0 for none.

    Returns:
        qdata (M, K) and scale float32 (M, ⌈K/block_size⌉) or (M, 1), a transposed view: a GEMM tile reads the scales of
        its rows contiguously.
    """
    rows, inner = x.shape
    values = rotate(x, rotate_by) if rotate_by else x.float()
    width = block_size or max(inner, 1)
    groups = torch.nn.functional.pad(values, (0, -inner % width)).unflatten(1, (-1, width))
    qdata, scale = _quantize_groups(groups, (2,), dtype)
    by_block = scale.new_empty(scale.shape[1], rows)
    by_block.copy_(scale.squeeze(2).t())
    return qdata.flatten(1)[:, :inner].contiguous(), by_block.t()


def prepare_quantizer(x, dtype: torch.dtype, block_size: int, rotate_by: int, keep: bool = True):
    """As :func:`..triton.quantize.prepare_quantizer`, by :func:`quantize_inputs`."""

    def quantize(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        qdata, scale = quantize_inputs(x, dtype, block_size, rotate_by)
        return qdata, scale.t()

    return quantize


def quantize_weight(weight: torch.Tensor, dtype: torch.dtype, block_size: int):
    """Quantize a weight (N, K) to ``dtype``, round to nearest.

    Returns:
        qdata (N, K) and scale float32, (N, 1) if ``block_size`` is 0, else (⌈N/block_size⌉, ⌈K/block_size⌉).
    """
    rows, columns = weight.shape
    if not block_size:
        return _quantize_groups(weight.float(), (1,), dtype)
    padded = torch.nn.functional.pad(weight.float(), (0, -columns % block_size, 0, -rows % block_size))
    blocks = padded.unflatten(1, (-1, block_size)).unflatten(0, (-1, block_size))
    qdata, scale = _quantize_groups(blocks, (1, 3), dtype)
    return qdata.flatten(2).flatten(0, 1)[:rows, :columns].contiguous(), scale.squeeze(3).squeeze(1)


def _expand_scale(scale: torch.Tensor, shape: torch.Size, block_size: int) -> torch.Tensor:
    """A weight's scale in a shape that broadcasts with the quantized weight."""
    if not block_size:
        return scale.reshape(-1, 1)
    rows, columns = shape
    return scale.repeat_interleave(block_size, 0)[:rows].repeat_interleave(block_size, 1)[:, :columns]


def dequantize_weight(qdata: torch.Tensor, scale: torch.Tensor, block_size: int, rotate_by: int, dtype: torch.dtype):
    """See :func:`...operators.dequantize_weight`."""
    weight = qdata.float() * _expand_scale(scale.float(), qdata.shape, block_size)
    return (rotate(weight, rotate_by) if rotate_by else weight).to(dtype)
