"""Quantizing inputs and weights to 8 bits, and back, in plain torch."""

import torch

from ..hadamard import rotate

__all__ = ["LARGEST", "SMALLEST_AMAX", "dequantize_weight", "quantize_inputs", "quantize_weight"]

# Largest magnitude of a code; −128 is left out.
LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
# A group of zeros is scaled as if it held this, so that no scale is 0 and no inverse infinite.
SMALLEST_AMAX = 2.0**-100


def _encode(groups: torch.Tensor, dims: tuple[int, ...], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes of float32 ``groups``, one scale over ``dims``, which are kept with size one.

    Ties go to even. Where a group holds NaN or Inf its scale is NaN or Inf, and so is all that is computed with it.
    """
    amax = groups.abs().amax(dims, keepdim=True).clamp_min(SMALLEST_AMAX)
    largest = torch.full_like(amax, LARGEST[dtype])  # a number would be made a reciprocal: rounded twice
    scaled = (groups * (largest / amax)).nan_to_num_(0.0).clamp_(-LARGEST[dtype], LARGEST[dtype])
    return (scaled.round_() if dtype is torch.int8 else scaled).to(dtype), amax / largest


def quantize_inputs(x: torch.Tensor, dtype: torch.dtype, block_size: int, rotate_by: int):
    """See :func:`...quantize_inputs`."""
    rows, inner = x.shape
    values = rotate(x, rotate_by) if rotate_by else x.float()
    width = block_size or max(inner, 1)
    groups = torch.nn.functional.pad(values, (0, -inner % width)).unflatten(1, (-1, width))
    codes, scale = _encode(groups, (2,), dtype)
    by_block = scale.new_empty(scale.shape[1], rows)  # a tile of a product reads the scales of its rows side by side
    by_block.copy_(scale.squeeze(2).t())
    return codes.flatten(1)[:, :inner].contiguous(), by_block.t()


def quantize_weight(weight: torch.Tensor, dtype: torch.dtype, block_size: int):
    """See :func:`...quantize_weight`."""
    rows, columns = weight.shape
    if not block_size:
        return _encode(weight.float(), (1,), dtype)
    padded = torch.nn.functional.pad(weight.float(), (0, -columns % block_size, 0, -rows % block_size))
    tiles = padded.unflatten(1, (-1, block_size)).unflatten(0, (-1, block_size))
    codes, scale = _encode(tiles, (1, 3), dtype)
    return codes.flatten(2).flatten(0, 1)[:rows, :columns].contiguous(), scale.squeeze(3).squeeze(1)


def _spread(scale: torch.Tensor, shape: tuple[int, int], block_size: int) -> torch.Tensor:
    """A weight's scale in a shape that broadcasts with its codes."""
    if not block_size:
        return scale.reshape(-1, 1)
    rows, columns = shape
    return scale.repeat_interleave(block_size, 0)[:rows].repeat_interleave(block_size, 1)[:, :columns]


def dequantize_weight(codes: torch.Tensor, scale: torch.Tensor, block_size: int, rotate_by: int, dtype: torch.dtype):
    """See :func:`...dequantize_weight`."""
    weight = codes.float() * _spread(scale.float(), codes.shape, block_size)
    return (rotate(weight, rotate_by) if rotate_by else weight).to(dtype)
