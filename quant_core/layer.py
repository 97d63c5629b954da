"""One weight, start to end: scale → codes → :class:`QuantizedWeight`."""

import torch

from .checkpoints.dtypes import SOURCE_DTYPES
from .errors import QuantizationError
from .events import CancelCheck
from .formats import QuantizedWeight, find_format
from .rounding import amax_scale, check_rounding, quantize_nearest, search_scale

__all__ = ["quantize_weight"]


def quantize_weight(
    weight: torch.Tensor,
    format: str,
    *,
    granularity: str | None = None,
    rounding: str = "auto",
    full_precision_matmul: bool = False,
    seed: int = 0,
    check: CancelCheck | None = None,
) -> QuantizedWeight:
    """Quantize one weight on the device it lies on.

    Args:
        weight: (out, in), float16, bfloat16 or float32; left untouched.
        format: key of :data:`FORMATS`.
        granularity: one of the format's granularities; None for its own.
        rounding: key of :data:`ROUNDINGS`.
        seed: draws the rows on which a shared scale is judged.
        check: called often; raise in it to cancel.

    Raises:
        NonFiniteWeightError: the weight holds NaN or Inf.
        QuantizationError: the weight is not a non-empty matrix of one of these dtypes.
        UnknownNameError: no such format, granularity or rounding.
    """
    check_rounding(rounding)
    entry = find_format(format)
    granularity, share = entry.granularity(granularity)
    if weight.ndim != 2 or weight.numel() == 0 or weight.dtype not in SOURCE_DTYPES:
        raise QuantizationError(
            f"A weight of shape {tuple(weight.shape)} and dtype {weight.dtype} cannot be quantized: "
            "give a non-empty matrix of float16, bfloat16 or float32."
        )
    weight = weight.detach()
    scale = amax_scale(weight, entry.grid, share, check)
    if rounding == "auto":
        scale = search_scale(weight, scale, entry.grid, share, seed=seed, check=check)
    codes, weight_error = quantize_nearest(weight, scale, entry.grid, share, check)
    return QuantizedWeight(codes, scale, entry, granularity, weight_error, full_precision_matmul)
