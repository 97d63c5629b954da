"""Histogram of activation magnitudes, and the static FP8 input scale computed from it."""

import math

import torch

from ..errors import CalibrationError
from ..formats import E4M3

__all__ = ["BINS", "bin_centers", "histogram", "input_scale"]

# Eight bins per octave from 2⁻³² to 2³². The first bin also counts smaller values and zero, the last one larger values.
_PER_OCTAVE = 8
_LOWEST, _HIGHEST = -32, 32
BINS = (_HIGHEST - _LOWEST) * _PER_OCTAVE

_MAX = 448.0  # of float8_e4m3fn
_MIN_AMAX = 64 * _MAX * torch.finfo(torch.float32).tiny  # below it, the smallest candidate scale is subnormal
_LEAST = torch.finfo(
    torch.float16
).tiny  # ComfyUI casts 1/scale to the dtype of the activations, where it may not overflow
_TOLERANCE = 0.01  # relative difference below which two errors count as equal


def bin_centers(device: torch.device | str = "cpu") -> torch.Tensor:
    """Return the geometric center of each bin, float64 (bins,); 0 for the first."""
    exponents = (torch.arange(BINS, dtype=torch.float64, device=device) + 0.5) / _PER_OCTAVE + _LOWEST
    centers = exponents.exp2()
    centers[0] = 0
    return centers


def histogram(values: torch.Tensor) -> torch.Tensor:
    """Count the magnitudes |values| per bin, float64 (bins,), on the same device."""
    exponents = values.abs().float().log2_().nan_to_num_(_HIGHEST).clamp_(_LOWEST, _HIGHEST)
    return torch.histc(exponents, BINS, _LOWEST, _HIGHEST).double()


def input_scale(counts: torch.Tensor, amax: float) -> float | None:
    """Compute the static scale of float8_e4m3fn activations with the least mean squared error.

    Without an ``input_scale`` ComfyUI uses scale 1: magnitudes above 448 are clipped, and those below 2⁻⁶ lose
    precision. Candidates are 2·amax/448·2^(−k/4) for k = 0…28, so the smaller ones clip; none is below 2⁻¹⁴, unless that
    leaves fewer than three octaves of normal numbers below amax. Of all candidates within 1 % of the least error the
    largest is returned, as headroom for activations outside the calibration set.

    Args:
        counts: (bins,) from :func:`histogram`.
        amax: largest magnitude of all activations.

    Returns:
        the scale; None where scale 1 is within 1 % of the least error, or nothing was counted.

    Raises:
        CalibrationError: the counts are not finite.
    """
    counts = counts.double().cpu()
    if not _MIN_AMAX < amax < float("inf") or not counts.sum() > 0:
        return None
    centers = bin_centers().clamp_max(amax)

    def error(scale: float) -> float:
        quantized = (centers / scale).clamp_max(_MAX).float().to(torch.float8_e4m3fn).double()
        return float((counts * (quantized * scale - centers).square()).sum())

    least = min(_LEAST, amax / (2**3 * E4M3.smallest_normal))
    scales = [max(2 * amax / _MAX * 2 ** (-step / 4), least) for step in range(29)]
    errors = [error(scale) for scale in scales]
    if not all(map(math.isfinite, errors)):
        raise CalibrationError("The histogram of activations contains values that are not finite; calibrate again.")
    if min(errors) > (1 - _TOLERANCE) * error(1.0):
        return None
    return next(scale for scale, loss in zip(scales, errors, strict=True) if loss <= (1 + _TOLERANCE) * min(errors))
