"""Bias correction: what an error E does to the mean output, the bias can take back."""

import torch

from ..cancellation import CancelCheck
from ..formats import Tiles
from .slabs import error_slabs

__all__ = ["correct_bias", "synthetic_mean"]


def correct_bias(
    bias: torch.Tensor,
    mean_input: torch.Tensor,
    weight: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    tiles: Tiles,
    check: CancelCheck | None = None,
) -> torch.Tensor:
    """b − E·x̄, so that the mean of Ŵx + b over the inputs is that of Wx + b. In the bias's dtype.

    Args:
        bias: (out,).
        mean_input: x̄, float32 (in,), in the basis of ``weight`` (rotated where that is).
        weight, codes, scale: what gives E = s·q − W.
    """
    corrected = bias.float()
    shift = torch.empty_like(corrected)
    for start, stop, error in error_slabs(weight, codes, scale, tiles, check):
        shift[start:stop] = error @ mean_input
    return (corrected - shift).to(bias.dtype)


def synthetic_mean(inner: int, samples: int, seed: int, device: torch.device) -> torch.Tensor:
    """The mean of ``samples`` draws of N(0, 1) per channel, float32 (in,); its expectation is zero."""
    generator = torch.Generator().manual_seed(seed)
    total = torch.zeros(inner)
    for _ in range(samples):
        total += torch.randn(inner, generator=generator)
    return (total / samples).to(device)
