"""FP8: E4M3 and E5M2 elements under float32 scales."""

from .codec import Format
from .elements import E4M3, E5M2
from .scaled import ScaledCodec

__all__ = ["FORMATS"]

_TENSOR_CORES = (8, 9)  # first compute capability that multiplies FP8

FORMATS = (
    Format(
        name="float8_e4m3fn",
        elements=E4M3,
        granularities={"tensor": {}},
        codec=ScaledCodec,
        note="8-bit float, one scale per tensor; runs on FP8 tensor cores from SM 8.9, is dequantized on older cards",
        stock_since="0.3.75",
        full_precision_matmul="choice",
        activations="tensor",
        native_since=_TENSOR_CORES,
        banks=True,
    ),
    Format(
        name="float8_e5m2",
        elements=E5M2,
        granularities={"tensor": {}},
        codec=ScaledCodec,
        note="8-bit float with two mantissa bits, dequantized on every card: twice the error of E4M3, for weights of a huge range",
        stock_since="0.8",
        full_precision_matmul="always",  # no NVIDIA card multiplies two E5M2 matrices
        banks=True,
    ),
    Format(
        name="float8_e4m3fn_rowwise",
        elements=E4M3,
        granularities={"row": {}},
        codec=ScaledCodec,
        note="8-bit float, one scale per row",
        stock_since=None,
        activations="token",
        native_since=_TENSOR_CORES,
    ),
    Format(
        name="float8_e4m3fn_blockwise",
        elements=E4M3,
        granularities={"block": {}},
        codec=ScaledCodec,
        note="8-bit float, one scale per square block",
        stock_since=None,
        activations="group",
        native_since=_TENSOR_CORES,
    ),
)
