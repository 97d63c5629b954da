"""Format "auto": the best format for the card."""

import torch

from ..formats import FormatConfig
from .aliases import make_format

__all__ = ["recommend_format"]

_INT8_TENSOR_CORES = (7, 5)  # the oldest compute capability that has them


def recommend_format(*, int8: bool = True) -> FormatConfig:
    """INT8 per row with ConvRot on cards with INT8 tensor cores, else FP8 per tensor.

    With a calibration the former has about a quarter of the latter's output error (``benchmarks/README.md``).

    Args:
        int8: whether the ComfyUI that loads the file reads INT8.
    """
    nvidia = torch.cuda.is_available() and torch.version.hip is None
    tensor_cores = nvidia and torch.cuda.get_device_capability() >= _INT8_TENSOR_CORES
    return make_format("int8" if int8 and tensor_cores else "fp8")
