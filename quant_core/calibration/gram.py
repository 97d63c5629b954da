"""Grams H = XᵀX/tokens of a layer's inputs X (tokens, in)."""

from dataclasses import dataclass

import torch

from ..errors import CalibrationError

__all__ = ["Gram", "Inputs", "LowRankGram", "dense_gram", "mean_vector"]


@dataclass(frozen=True)
class LowRankGram:
    """H ≈ F·Fᵀ + diag(d): what is kept of a Gram when it must be small.

    Attributes:
        factor: (in, rank), any float dtype: eigenvectors times the roots of their eigenvalues.
        diagonal: (in,), what the factor leaves of H's diagonal; not negative.
    """

    factor: torch.Tensor
    diagonal: torch.Tensor


Gram = torch.Tensor | LowRankGram


@dataclass(frozen=True)
class Inputs:
    """What is known of a layer's inputs, in the basis of the original weight; None for unknown.

    Attributes:
        gram: H, (in, in) or low rank.
        holdout_gram: the Gram of other inputs, on which results are judged.
        mean: x̄, (in,).
    """

    gram: Gram | None = None
    holdout_gram: Gram | None = None
    mean: torch.Tensor | None = None


def dense_gram(gram: Gram, inner: int, device: torch.device) -> torch.Tensor:
    """H as a float32 matrix (in, in) on ``device``.

    Raises:
        CalibrationError: the shape is not that of ``inner`` input channels, or values are not finite.
    """
    if isinstance(gram, LowRankGram):
        shapes = tuple(gram.factor.shape), tuple(gram.diagonal.shape)
        if shapes[0][:1] != (inner,) or shapes[1] != (inner,):
            raise CalibrationError(f"A low-rank Gram of shapes {shapes} does not fit {inner} input channels.")
        factor = gram.factor.detach().to(device, torch.float32)
        matrix = factor @ factor.t()
        matrix.diagonal().add_(gram.diagonal.to(device, torch.float32))
    else:
        if tuple(gram.shape) != (inner, inner):
            raise CalibrationError(
                f"A Gram of shape {tuple(gram.shape)} does not fit a layer of {inner} input channels; "
                f"it must be ({inner}, {inner})."
            )
        matrix = gram.detach().to(device, torch.float32)
    if not torch.isfinite(matrix.diagonal()).all() or not torch.isfinite(matrix.sum()):
        raise CalibrationError("The Gram holds NaN or Inf; calibrate again.")
    if (matrix.diagonal() < 0).any():
        raise CalibrationError("The Gram has a negative diagonal, so it is no Gram; calibrate again.")
    return matrix


def mean_vector(mean: torch.Tensor, inner: int, device: torch.device) -> torch.Tensor:
    """x̄ as float32 (in,) on ``device``. Raises :class:`CalibrationError` when it does not fit or is not finite."""
    if tuple(mean.shape) != (inner,):
        raise CalibrationError(f"A mean input of shape {tuple(mean.shape)} does not fit {inner} input channels.")
    mean = mean.detach().to(device, torch.float32)
    if not torch.isfinite(mean).all():
        raise CalibrationError("The mean input holds NaN or Inf; calibrate again.")
    return mean
