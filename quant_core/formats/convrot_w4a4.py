"""ConvRot W4A4: INT4 of the rotated weight, one float32 scale per row. Read only."""

from collections.abc import Mapping

import torch

from .codec import Codec, Format, Parts, TensorSpec, read_count
from .elements import INT4
from .packing import unpack_nibbles
from .rotation import Rotation

__all__ = ["FORMATS", "ConvRotW4A4Codec"]


class ConvRotW4A4Codec(Codec):
    """W = R · weight_scale · INT4. ``weight``: int8 (M, N/2), the even column in the low four bits; ``weight_scale``: float32 (M,)."""

    @property
    def config(self) -> dict[str, object]:
        return {"format": self.format.name, "convrot_groupsize": self.rotation.size if self.rotation else 0}

    @classmethod
    def from_config(cls, format: Format, config: Mapping[str, object], granularity: str) -> Codec:
        return cls(format, granularity, rotation=Rotation(read_count(config, "convrot_groupsize", 256)))

    def weight_shape(self, stored: tuple[int, ...], config: Mapping[str, object]) -> tuple[int, int]:
        rows, packed = super().weight_shape(stored, config)
        return rows, 2 * packed

    def specs(self, shape: tuple[int, ...]) -> dict[str, TensorSpec]:
        return {
            "weight": TensorSpec(self.format.storage_dtype, (shape[0], shape[1] // 2), views=(torch.uint8,)),
            "weight_scale": TensorSpec(torch.float32, (shape[0],)),
        }

    def dequantize(self, parts: Parts, shape: tuple[int, ...]) -> torch.Tensor:
        values = unpack_nibbles(parts["weight"], high_first=False)
        signed = torch.where(values < 8, values, values - 16).float()
        return self.unrotate(signed * parts["weight_scale"].float().reshape(-1, 1))


FORMATS = (
    Format(
        name="convrot_w4a4",
        elements=INT4,
        granularities={"row": {}},
        codec=ConvRotW4A4Codec,
        note="4-bit integer of the rotated weight, one scale per row",
        stock_since="0.28",
        activations="token",
        rotated=("row",),
        writable=False,
        storage=torch.int8,
    ),
)
