"""Grams H = XᵀX/tokens of a layer's inputs X (tokens, in): what is kept of them, and the matrix they stand for."""

from dataclasses import dataclass

import torch

from ..errors import CalibrationError
from .panels import packed_size, unpack

__all__ = [
    "Gram",
    "Inputs",
    "LowRankGram",
    "PackedGram",
    "PairedGram",
    "dense_gram",
    "mean_vector",
    "quantized_grams",
    "roots",
]


@dataclass(frozen=True)
class LowRankGram:
    """H ≈ F·Fᵀ + diag(d): what is kept of a Gram when it must be small.

    Attributes:
        factor: (in, rank), any float dtype: eigenvectors times the roots of their eigenvalues, or rows of inputs.
        diagonal: (in,), what the factor leaves of H's diagonal; not negative.
    """

    factor: torch.Tensor
    diagonal: torch.Tensor


@dataclass(frozen=True)
class PackedGram:
    """H = diag(r)·C·diag(r) by its exact roots and the lower half of its correlations.

    Sixteen bits a correlation keep H to a relative 2e-4, while bfloat16 sums would keep it to 2e-3.

    Attributes:
        panels: the lower half of C, one-dimensional, see :mod:`.panels`; any float dtype.
        roots: r, float32 (in,): square roots of H's diagonal.
    """

    panels: torch.Tensor
    roots: torch.Tensor


@dataclass(frozen=True)
class PairedGram:
    """The Gram of inputs side by side with what INT8 per token makes of them, [X, X̂] (tokens, 2·in).

    Attributes:
        panels, roots: as those of a :class:`PackedGram` of 2·in channels.
        mean: float32 (2·in,): the means of X and of X̂.
    """

    panels: torch.Tensor
    roots: torch.Tensor
    mean: torch.Tensor


Gram = torch.Tensor | LowRankGram | PackedGram | PairedGram


@dataclass(frozen=True)
class Inputs:
    """What is known of a layer's inputs, in the basis of the original weight; None for unknown.

    Attributes:
        gram: H, (in, in), packed, or low rank.
        holdout_gram: the Gram of other inputs, on which results are judged.
        mean: x̄, (in,).
        amax: largest magnitude of each channel, (in,).
        histogram: how often each magnitude occurs among some of them, see :mod:`.histogram`.
        sensitivity: the relative squared error of the model's output that comes of a relative squared error 1 of the
            layer's output, see :mod:`.sensitivity`.
    """

    gram: Gram | None = None
    holdout_gram: Gram | None = None
    mean: torch.Tensor | None = None
    amax: torch.Tensor | None = None
    histogram: torch.Tensor | None = None
    sensitivity: float | None = None

    @property
    def holdout_rows(self) -> torch.Tensor | None:
        """Held-out inputs themselves, (tokens, in), where they are kept as such."""
        kept = self.holdout_gram
        if not isinstance(kept, LowRankGram) or kept.diagonal.any():
            return None
        return kept.factor.t() * kept.factor.shape[1] ** 0.5


def roots(diagonal: torch.Tensor) -> torch.Tensor:
    """Square roots of a Gram's diagonal, and 1 for channels that are always zero, so that they can be divided by."""
    return torch.where(diagonal > 0, diagonal, torch.ones_like(diagonal)).sqrt_()


def _fits(gram: Gram, inner: int) -> bool:
    if isinstance(gram, LowRankGram):
        return gram.factor.ndim == 2 and len(gram.factor) == inner and tuple(gram.diagonal.shape) == (inner,)
    if isinstance(gram, PackedGram):
        return gram.panels.numel() == packed_size(inner) and tuple(gram.roots.shape) == (inner,)
    if isinstance(gram, PairedGram):
        return _fits(PackedGram(gram.panels, gram.roots), 2 * inner) and tuple(gram.mean.shape) == (2 * inner,)
    return tuple(gram.shape) == (inner, inner)


def _shapes(gram: Gram) -> str:
    parts = [gram] if isinstance(gram, torch.Tensor) else vars(gram).values()
    return " and ".join(str(tuple(part.shape)) for part in parts)


def dense_gram(gram: Gram, inner: int, device: torch.device) -> torch.Tensor:
    """H as a float32 matrix (in, in) on ``device``.

    Raises:
        CalibrationError: the shape is not that of ``inner`` input channels, or values are not finite.
    """
    _check_fits(gram, inner)
    if isinstance(gram, PairedGram):
        return _paired(gram, inner, device)[:inner, :inner].contiguous()
    if isinstance(gram, LowRankGram):
        factor = gram.factor.detach().to(device, torch.float32)
        matrix = factor @ factor.t()
        matrix.diagonal().add_(gram.diagonal.to(device, torch.float32))
    elif isinstance(gram, PackedGram):
        root = gram.roots.to(device, torch.float32)
        matrix = unpack(gram.panels.detach().to(device), inner).mul_(root).mul_(root[:, None])
    else:
        matrix = gram.detach().to(device, torch.float32)
    return _sound(matrix)


def quantized_grams(gram: PairedGram, inner: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """(XᵀX̂, X̂ᵀX̂)/tokens, two float32 matrices (in, in) on ``device``. Raises as :func:`dense_gram`."""
    _check_fits(gram, inner)
    both = _paired(gram, inner, device)
    return both[:inner, inner:].contiguous(), both[inner:, inner:].contiguous()


def _paired(gram: PairedGram, inner: int, device: torch.device) -> torch.Tensor:
    return dense_gram(PackedGram(gram.panels, gram.roots), 2 * inner, device)


def _check_fits(gram: Gram, inner: int) -> None:
    if not _fits(gram, inner):
        raise CalibrationError(
            f"A Gram of shape {_shapes(gram)} does not fit a layer of {inner} input channels; it must be ({inner}, {inner})."
        )


def _sound(matrix: torch.Tensor) -> torch.Tensor:
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
