"""How often each magnitude occurs among a layer's inputs, and the static scale of FP8 inputs that follows from it."""

import math

import torch

from ..errors import CalibrationError

__all__ = ["BINS", "magnitudes", "histogram", "input_scale"]

# Eight bins to the octave from 2⁻³² to 2³²; the first also takes what is smaller, zero included, the last what is larger.
_PER_OCTAVE = 8
_LOWEST, _HIGHEST = -32, 32
BINS = (_HIGHEST - _LOWEST) * _PER_OCTAVE


def magnitudes(device: torch.device | str = "cpu") -> torch.Tensor:
    """The middle of each bin, float64 (bins,); 0 for the first."""
    exponents = (torch.arange(BINS, dtype=torch.float64, device=device) + 0.5) / _PER_OCTAVE + _LOWEST
    middles = exponents.exp2()
    middles[0] = 0
    return middles


def histogram(values: torch.Tensor) -> torch.Tensor:
    """Counts of |values|, float64 (bins,), on their device."""
    exponents = values.abs().float().log2_().nan_to_num_(_HIGHEST).clamp_(_LOWEST, _HIGHEST)
    return torch.histc(exponents, BINS, _LOWEST, _HIGHEST).double()


def input_scale(counts: torch.Tensor, amax: float) -> float | None:
    """The static scale of float8_e4m3fn inputs with the least mean squared error; None where scale 1 is as good.

    Without a scale ComfyUI takes inputs as they are: what is beyond ±448 is clipped, and what is below 2⁻⁶ loses bits.
    Scales from twice what the largest value ever seen needs down to a 64th of that (which clips) are tried on the
    histogram; of those that are as good as the best the largest, so that there is room for inputs never seen.

    Args:
        counts: from :func:`histogram`, (bins,).
        amax: the largest magnitude, of all inputs.

    Raises:
        CalibrationError: the counts are none.
    """
    counts = counts.double().cpu()
    if not _LEAST < amax < float("inf") or not counts.sum() > 0:
        return None
    middles = magnitudes().clamp_max(amax)

    def error(scale: float) -> float:
        codes = (middles / scale).clamp_max(_MAX).float().to(torch.float8_e4m3fn).double()
        return float((counts * (codes * scale - middles).square()).sum())

    scales = [2 * amax / _MAX * 2 ** (-step / 4) for step in range(29)]
    errors = [error(scale) for scale in scales]
    if not all(map(math.isfinite, errors)):
        raise CalibrationError("A histogram of inputs holds what is no count; calibrate again.")
    if min(errors) > (1 - _TOLERANCE) * error(1.0):
        return None
    return next(scale for scale, lost in zip(scales, errors, strict=True) if lost <= (1 + _TOLERANCE) * min(errors))


_MAX = 448.0  # of float8_e4m3fn
_LEAST = 64 * _MAX * torch.finfo(torch.float32).tiny  # below, scales would be no normal numbers
_TOLERANCE = 0.01  # by which one error must be smaller than another to count as better
