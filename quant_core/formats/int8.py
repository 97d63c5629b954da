"""INT8: symmetric integers under float32 scales, per row also in the ConvRot basis."""

from .codec import Format
from .elements import INT8
from .scaled import ScaledCodec

__all__ = ["FORMATS"]

FORMATS = (
    Format(
        name="int8_tensorwise",
        elements=INT8,
        granularities={"row": {"per_row": True}, "tensor": {}},
        codec=ScaledCodec,
        note="8-bit integer, one scale per row or per tensor; runs on INT8 tensor cores from SM 7.5",
        stock_since="0.27",
        activations="token",
        rotated=("row",),
        banks=True,
    ),
    Format(
        name="int8_blockwise",
        elements=INT8,
        granularities={"block": {}},
        codec=ScaledCodec,
        note="8-bit integer, one scale per square block",
        stock_since=None,
        activations="group",
    ),
)
