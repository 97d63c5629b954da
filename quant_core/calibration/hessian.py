"""Hessian proxies H = XᵀX/n of the layer-wise squared error ‖X·(Ŵ − W)ᵀ‖², X (n, in) being the input activations.

H is the Hessian of GPTQ (arXiv 2210.17323) up to a constant factor. It is stored dense, packed, as an 8-bit factor, or in low rank;
:func:`dense_hessian` expands each of them.
"""

from dataclasses import dataclass, replace

import torch

from ..errors import CalibrationError
from .panels import pack_symmetric, packed_size, unpack_symmetric
from .triangle import SEGMENT, decode_triangle, encode_triangle, segment_count

__all__ = [
    "Hessian",
    "LowRankHessian",
    "PackedHessian",
    "PairedHessian",
    "TriangularHessian",
    "channel_rms",
    "dense_hessian",
    "hessian_rms",
    "low_rank_factor",
    "mean_vector",
    "move_hessian",
    "pack_triangle",
    "quantized_hessians",
    "unpack_triangle",
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


@dataclass(frozen=True)
class TriangularHessian:
    """H = diag(r)·L·Lᵀ·diag(r): exact channel RMS r and the Cholesky factor L of the correlations in 8 bits.

    Attributes:
        levels: L below its diagonal, int8, one-dimensional, see :mod:`.triangle`.
        scales: float32, one-dimensional: of the levels.
        diagonal: of L, float32 (in,).
        rms: r, float32 (in,), as in a :class:`PackedHessian`.
    """

    levels: torch.Tensor
    scales: torch.Tensor
    diagonal: torch.Tensor
    rms: torch.Tensor


Hessian = torch.Tensor | LowRankHessian | PackedHessian | PairedHessian | TriangularHessian


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
    elif isinstance(hessian, TriangularHessian):
        rms = hessian.rms.to(device, torch.float32)
        matrix = _correlations(hessian, device).mul_(rms).mul_(rms[:, None])
    elif isinstance(hessian, PackedHessian):
        rms = hessian.rms.to(device, torch.float32)
        matrix = unpack_symmetric(hessian.panels.detach().to(device), in_channels).mul_(rms).mul_(rms[:, None])
    else:
        matrix = hessian.detach().to(device, torch.float32)
    _check_values(matrix)
    return matrix


def hessian_rms(hessian: Hessian, in_channels: int, device: torch.device) -> torch.Tensor:
    """Return the RMS activation of each channel as float32 (in,) on ``device``. Raises CalibrationError for another shape."""
    _check_shape(hessian, in_channels)
    if isinstance(hessian, torch.Tensor):
        rms = hessian.detach().diagonal().float().sqrt()
    elif isinstance(hessian, LowRankHessian):
        rms = (hessian.factor.detach().float().square().sum(dim=1) + hessian.diagonal.float()).sqrt()
    else:
        rms = hessian.rms[:in_channels]
    return rms.to(device, torch.float32)


def move_hessian(hessian: Hessian, device: torch.device) -> Hessian:
    """Return the same Hessian on ``device``."""
    if isinstance(hessian, torch.Tensor):
        return hessian.to(device)
    return replace(hessian, **{field: part.to(device) for field, part in vars(hessian).items()})


def _correlations(hessian: TriangularHessian, device: torch.device) -> torch.Tensor:
    return decode_triangle(
        hessian.levels.to(device), hessian.scales.to(device, torch.float32), hessian.diagonal.to(device, torch.float32)
    )


def pack_triangle(hessian: PackedHessian, device: torch.device) -> TriangularHessian:
    """Round H to 8 bits; the arithmetic runs on ``device``, the result is on the CPU.

    Raises:
        CalibrationError: H is not positive semi-definite, or not finite.
    """
    correlations = unpack_symmetric(hessian.panels.to(device), len(hessian.rms))
    rms = torch.where(correlations.diagonal().cpu() > 0, hessian.rms, 0)  # 1 for channels that are always zero
    levels, scales, diagonal = (part.cpu() for part in encode_triangle(correlations))
    return TriangularHessian(levels, scales, diagonal, rms)


def unpack_triangle(hessian: TriangularHessian, device: torch.device) -> PackedHessian:
    """Convert H to 16 bits on ``device``, without what :func:`~.triangle.encode_triangle` added to the diagonal."""
    correlations = _correlations(hessian, device)
    correlations.diagonal().clamp_(max=1).mul_((hessian.rms > 0).to(device))
    return PackedHessian(pack_symmetric(correlations, torch.float16), hessian.rms)


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
    if isinstance(hessian, TriangularHessian):
        sizes = packed_size(count, SEGMENT), segment_count(count), count, count
        return tuple(part.numel() for part in vars(hessian).values()) == sizes
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
