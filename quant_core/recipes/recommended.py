"""Format "auto": what suits the card."""

import torch

from .layers import FormatChoice

__all__ = ["recommended_format"]

_INT8_TENSOR_CORES = (7, 5)  # the oldest compute capability that has them


def recommended_format(*, int8: bool = True) -> FormatChoice:
    """INT8 per row with ConvRot where the card multiplies it in hardware, else FP8 per tensor.

    With a calibration the former has about a quarter of the latter's output error (``benchmarks/README.md``).

    Args:
        int8: whether what shall load the file knows INT8.
    """
    nvidia = torch.cuda.is_available() and torch.version.hip is None
    if int8 and nvidia and torch.cuda.get_device_capability() >= _INT8_TENSOR_CORES:
        return FormatChoice("int8_tensorwise", "row", convrot=True)
    return FormatChoice("float8_e4m3fn", "tensor")
