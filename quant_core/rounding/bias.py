"""Bias correction: the bias takes back what an error E adds to the mean output."""

import torch

from ..cancellation import CancelCheck
from ..formats import SolveSpace
from .slabs import error_slabs

__all__ = ["correct_bias", "synthetic_mean"]


def correct_bias(
    bias: torch.Tensor,
    mean: torch.Tensor,
    weight: torch.Tensor,
    qdata: torch.Tensor,
    scale: torch.Tensor,
    space: SolveSpace,
    check: CancelCheck | None = None,
) -> torch.Tensor:
    """b − E·x̄, in the dtype of ``bias``: the mean of Ŵx + b over the activations equals that of Wx + b.

    Args:
        bias: (out,).
        mean: x̄, float32 (in,), in the basis of ``weight`` (rotated where that is).
        weight, qdata, scale: what gives E = Ŵ − W; all in the stored basis.
    """
    corrected = bias.float()
    shift = torch.empty_like(corrected)
    for start, stop, error in error_slabs(weight, qdata, scale, space, check):
        shift[start:stop] = error @ mean
    return (corrected - shift).to(bias.dtype)


def synthetic_mean(inner: int, samples: int, seed: int, device: torch.device) -> torch.Tensor:
    """The mean of ``samples`` draws of N(0, 1) per channel, float32 (in,); its expectation is zero."""
    generator = torch.Generator().manual_seed(seed)
    total = torch.zeros(inner)
    for _ in range(samples):
        total += torch.randn(inner, generator=generator)
    return (total / samples).to(device)
