"""Hessian proxies H = XᵀX/n of the layer-wise squared error ‖X·(Ŵ − W)ᵀ‖², X (n, in) being the input activations.

H is the Hessian of GPTQ (arXiv 2210.17323) up to a constant factor. It is stored dense, packed, or in low rank;
:func:`dense_hessian` expands each of them.
"""

from dataclasses import dataclass

import torch

from ..errors import CalibrationError
from .panels import packed_size, unpack_symmetric

__all__ = [
    "Hessian",
    "LowRankHessian",
    "PackedHessian",
    "PairedHessian",
    "channel_rms",
    "dense_hessian",
    "low_rank_factor",
    "mean_vector",
    "quantized_hessians",
]

_NOT_FINITE = "The Hessian contains NaN or Inf; calibrate again."


@dataclass(frozen=True)
class LowRankHessian:
    """H ≈ F·Fᵀ + diag(d): leading directions and the exact diagonal.

    Attributes:
        factor: F (in, rank), any float dtype: eigenvectors scaled by the square roots of their eigenvalues, or Xᵀ/√n.
        diagonal: d (in,), the part of the diagonal of H that F·Fᵀ does not cover; non-negative.
    """

    factor: torch.Tensor
    diagonal: torch.Tensor


@dataclass(frozen=True)
class PackedHessian:
    """H = diag(r)·C·diag(r): exact channel RMS r and the packed correlations C.

    float16 correlations reproduce H to a relative error of 2e-4; bfloat16 elements of H would reproduce it to 2e-3.

    Attributes:
        panels: lower triangle of C, one-dimensional, any float dtype, see :mod:`.panels`.
        rms: r, float32 (in,): square roots of the diagonal of H, 1 for channels that are always zero.
    """

    panels: torch.Tensor
    rms: torch.Tensor


@dataclass(frozen=True)
class PairedHessian:
    """Hessian of [X, X̂] (n, 2·in): activations next to their INT8 per-token quantization X̂.

    Attributes:
        panels, rms: as in a :class:`PackedHessian` with 2·in channels.
        mean: float32 (2·in,): means of X and of X̂.
    """

    panels: torch.Tensor
    rms: torch.Tensor
    mean: torch.Tensor


Hessian = torch.Tensor | LowRankHessian | PackedHessian | PairedHessian


def channel_rms(diagonal: torch.Tensor) -> torch.Tensor:
    """Return the square roots of a Hessian's diagonal, with 1 for zero channels so that division is safe."""
    return torch.where(diagonal > 0, diagonal, torch.ones_like(diagonal)).sqrt_()


def dense_hessian(hessian: Hessian, in_channels: int, device: torch.device) -> torch.Tensor:
    """Expand H to float32 (in, in) on ``device``.

    Raises:
        CalibrationError: H does not have ``in_channels`` channels, is not finite, or has a negative diagonal element.
    """
    _check_shape(hessian, in_channels)
    if isinstance(hessian, PairedHessian):
        return _dense_pair(hessian, in_channels, device)[:in_channels, :in_channels].contiguous()
    if isinstance(hessian, LowRankHessian):
        factor = hessian.factor.detach().to(device, torch.float32)
        matrix = factor @ factor.t()
        matrix.diagonal().add_(hessian.diagonal.to(device, torch.float32))
    elif isinstance(hessian, PackedHessian):
        rms = hessian.rms.to(device, torch.float32)
        matrix = unpack_symmetric(hessian.panels.detach().to(device), in_channels).mul_(rms).mul_(rms[:, None])
    else:
        matrix = hessian.detach().to(device, torch.float32)
    _check_values(matrix)
    return matrix


def low_rank_factor(hessian: LowRankHessian, in_channels: int, device: torch.device) -> torch.Tensor:
    """Return F as float32 (in, rank) on ``device``. Raises as :func:`dense_hessian`."""
    _check_shape(hessian, in_channels)
    factor = hessian.factor.detach().to(device, torch.float32)
    if not torch.isfinite(factor).all():
        raise CalibrationError(_NOT_FINITE)
    return factor


def quantized_hessians(
    hessian: PairedHessian, in_channels: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (XᵀX̂/n, X̂ᵀX̂/n), two float32 matrices (in, in) on ``device``. Raises as :func:`dense_hessian`."""
    _check_shape(hessian, in_channels)
    pair = _dense_pair(hessian, in_channels, device)
    return pair[:in_channels, in_channels:].contiguous(), pair[in_channels:, in_channels:].contiguous()


def _dense_pair(hessian: PairedHessian, in_channels: int, device: torch.device) -> torch.Tensor:
    return dense_hessian(PackedHessian(hessian.panels, hessian.rms), 2 * in_channels, device)


def _has_channels(hessian: Hessian, count: int) -> bool:
    if isinstance(hessian, LowRankHessian):
        return hessian.factor.ndim == 2 and len(hessian.factor) == count and tuple(hessian.diagonal.shape) == (count,)
    if isinstance(hessian, PackedHessian):
        return hessian.panels.numel() == packed_size(count) and tuple(hessian.rms.shape) == (count,)
    if isinstance(hessian, PairedHessian):
        packed = PackedHessian(hessian.panels, hessian.rms)
        return _has_channels(packed, 2 * count) and tuple(hessian.mean.shape) == (2 * count,)
    return tuple(hessian.shape) == (count, count)


def _check_shape(hessian: Hessian, in_channels: int) -> None:
    if _has_channels(hessian, in_channels):
        return
    parts = [hessian] if isinstance(hessian, torch.Tensor) else vars(hessian).values()
    shapes = " and ".join(str(tuple(part.shape)) for part in parts)
    raise CalibrationError(
        f"A Hessian of shape {shapes} does not fit a layer with {in_channels} input channels; calibrate this model."
    )


def _check_values(matrix: torch.Tensor) -> None:
    if not torch.isfinite(matrix.diagonal()).all() or not torch.isfinite(matrix.sum()):
        raise CalibrationError(_NOT_FINITE)
    if (matrix.diagonal() < 0).any():
        raise CalibrationError("The Hessian has a negative diagonal element; calibrate again.")


def mean_vector(mean: torch.Tensor, in_channels: int, device: torch.device) -> torch.Tensor:
    """Return the mean activation as float32 (in,) on ``device``.

    Raises:
        CalibrationError: it does not have ``in_channels`` channels, or is not finite.
    """
    if tuple(mean.shape) != (in_channels,):
        raise CalibrationError(
            f"A mean activation of shape {tuple(mean.shape)} does not fit a layer with {in_channels} input channels; "
            "calibrate this model."
        )
    mean = mean.detach().to(device, torch.float32)
    if not torch.isfinite(mean).all():
        raise CalibrationError("The mean activation contains NaN or Inf; calibrate again.")
    return mean
