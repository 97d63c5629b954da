"""W4A8: 4-bit indices into a codebook, scaled per group and per channel, of the rotated weight. Read only."""

from collections.abc import Mapping

import torch

from .codec import Codec, Format, Parts, TensorSpec, read_count
from .elements import INT8
from .packing import unpack_nibbles
from .rotation import Rotation

__all__ = ["FORMATS", "AsymW4A8Codec"]


class AsymW4A8Codec(Codec):
    """W = R · weight_s_channel · round(weight_s_rel · weight_codebook[index]), clamped to ±127 in between.

    ``weight``: int8 (M, N/2), the even column in the low four bits; ``weight_s_rel``: E4M3 or float32 (M, N/group_size);
    ``weight_s_channel``: float32 (M,); ``weight_codebook``: float32 (16,), optional, index − 8 without it.
    """

    signed = ("weight_codebook",)

    @property
    def magnitude_bits(self) -> int:
        return 0  # codebooks have no zero

    @property
    def group_size(self) -> int | None:
        return self.block_size

    @property
    def config(self) -> dict[str, object]:
        rotation = self.rotation.size if self.rotation else 0
        return {"format": self.format.name, "group_size": self.group_size, "convrot_groupsize": rotation}

    @classmethod
    def from_config(cls, format: Format, config: Mapping[str, object], granularity: str) -> Codec:
        rotation = Rotation(read_count(config, "convrot_groupsize", 256))
        return cls(format, granularity, block_size=read_count(config, "group_size", 16), rotation=rotation)

    def weight_shape(self, stored: tuple[int, ...], config: Mapping[str, object]) -> tuple[int, int]:
        rows, packed = super().weight_shape(stored, config)
        return rows, 2 * packed

    def specs(self, shape: tuple[int, ...]) -> dict[str, TensorSpec]:
        out, inner = shape
        return {
            "weight": TensorSpec(self.format.storage_dtype, (out, inner // 2), views=(torch.uint8,)),
            "weight_s_rel": TensorSpec(
                torch.float8_e4m3fn, (out, inner // (self.group_size or 1)), views=(torch.uint8, torch.float32)
            ),
            "weight_s_channel": TensorSpec(torch.float32, (out,)),
        }

    def optional(self, shape: tuple[int, ...]) -> dict[str, TensorSpec]:
        return {"weight_codebook": TensorSpec(torch.float32, (16,))}

    def dequantize(self, parts: Parts, shape: tuple[int, ...]) -> torch.Tensor:
        values = unpack_nibbles(parts["weight"], high_first=False)
        levels = parts["weight_codebook"].float()[values] if "weight_codebook" in parts else values.float() - 8
        scale = parts["weight_s_rel"]
        scale = (scale.view(torch.float8_e4m3fn) if scale.dtype is torch.uint8 else scale).float()
        if scale.shape[-1] * (self.group_size or 0) != values.shape[-1]:
            raise ValueError(
                f"its group_size {self.group_size} contradicts {scale.shape[-1]} scales for {values.shape[-1]} columns"
            )
        int8 = (levels.unflatten(1, (scale.shape[-1], -1)) * scale[..., None]).flatten(1).round_().clamp_(-127, 127)
        return self.unrotate(int8 * parts["weight_s_channel"].float().reshape(-1, 1))


FORMATS = (
    Format(
        name="asym_w4a8_int8",
        elements=INT8,
        granularities={"group": {}},
        codec=AsymW4A8Codec,
        note="4-bit codebook indices of the rotated weight in groups, multiplied as INT8",
        stock_since="0.31",
        activations="token",
        rotated=("group",),
        writable=False,
        storage=torch.int8,
    ),
)
