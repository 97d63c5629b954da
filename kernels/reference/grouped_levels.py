"""Linear layers with W4A8 weights in plain torch: 4-bit indices of levels, scaled per group to INT8 values."""

import functools

import torch

from .linear import compute_linear

__all__ = ["expand_weight", "prepare_w4a8_linear", "scale_levels"]

_ZERO = 8  # index of the level 0 without a codebook


def scale_levels(levels: torch.Tensor, group_scale: torch.Tensor) -> torch.Tensor:
    """INT8 values (N, K) of levels (N, K) and their scale per group (N, groups), ties to even, clamped to ±127.

    Raises:
        ValueError: the number of groups does not divide that of the columns.
    """
    groups, columns = group_scale.shape[-1], levels.shape[-1]
    if not groups or columns % groups:
        raise ValueError(f"{groups} group scales do not divide {columns} columns")
    values = levels.to(torch.float32, copy=True).unflatten(-1, (groups, -1)).mul_(group_scale.float()[..., None])
    return values.flatten(-2).round_().clamp_(-127, 127).to(torch.int8)


def expand_weight(qdata: torch.Tensor, group_scale: torch.Tensor, codebook: torch.Tensor | None) -> torch.Tensor:
    """The INT8 values of a W4A8 weight.

    Args:
        qdata: one-byte dtype (N, K/2), the index of the even column in the low four bits.
        group_scale: float8_e4m3fn or float32 (N, groups).
        codebook: levels, float32 (16,); None for index − 8.

    Returns:
        int8 (N, K).
    """
    packed = qdata.view(torch.uint8).long()
    indices = torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)
    return scale_levels(indices - _ZERO if codebook is None else codebook.float()[indices], group_scale)


def _compute(x, qdata, group_scale, scale, codebook, bias, rotate_by: int, out_dtype: torch.dtype) -> torch.Tensor:
    values = expand_weight(qdata, group_scale, codebook)
    return compute_linear(x, values, scale[:, None], bias, block_size=0, rotate_by=rotate_by, out_dtype=out_dtype)


def prepare_w4a8_linear(
    x, qdata, group_scale, scale, codebook, bias, rotate_by: int, out_dtype: torch.dtype, keep: bool = True
):
    """As :func:`..triton.grouped_levels.prepare_w4a8_linear`, by :func:`expand_weight` and a product in float32."""
    return functools.partial(_compute, rotate_by=rotate_by, out_dtype=out_dtype)
