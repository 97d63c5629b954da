"""ConvRot W4A4: INT4 of the rotated weight, one float32 scale per row (ConvRot, arXiv 2512.03673)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from .codec import Codec, Format, Parts, TensorSpec, read_count
from .elements import INT4, INT8, ElementFormat
from .packing import pack_nibbles, unpack_nibbles
from .solution import Solution

__all__ = ["FORMATS", "ConvRotW4A4Codec"]

_FIRST_INT4, _FIRST_WITHOUT = (7, 5), (9, 0)  # compute capabilities with INT4 tensor cores
_COLUMNS = 64  # input channels are a multiple of this, as ComfyUI's kernels take them


@dataclass(frozen=True)
class ConvRotW4A4Codec(Codec):
    """W = R · weight_scale · INT4. ``weight``: int8 (M, N/2), the even column in the low four bits; ``weight_scale``: float32 (M,).

    Attributes:
        linear_dtype: what ComfyUI quantizes activations to on a GPU: "int8", or "int4" on SM 7.5 and 8.x.
    """

    linear_dtype: str = "int8"

    options: ClassVar[Mapping[str, tuple[object, ...]]] = {"linear_dtype": ("int8", "int4")}

    @property
    def config(self) -> dict[str, object]:
        rotation = self.rotation.size if self.rotation else 0
        return {"format": self.format.name, "convrot_groupsize": rotation, "linear_dtype": self.linear_dtype}

    @classmethod
    def from_config(cls, format: Format, config: Mapping[str, object], granularity: str) -> Codec:
        return format.make(
            granularity,
            convrot=read_count(config, "convrot_groupsize", 256),
            linear_dtype=config.get("linear_dtype", "int4"),
        )

    def admits(self, shape: tuple[int, ...]) -> str | None:
        if shape[1] % _COLUMNS:
            return f"its {shape[1]} input channels are not a multiple of {_COLUMNS}"
        return super().admits(shape)

    def weight_shape(self, stored: tuple[int, ...], config: Mapping[str, object]) -> tuple[int, int]:
        rows, packed = super().weight_shape(stored, config)
        return rows, 2 * packed

    def specs(self, shape: tuple[int, ...]) -> dict[str, TensorSpec]:
        return {
            "weight": TensorSpec(self.format.storage_dtype, (shape[0], shape[1] // 2), views=(torch.uint8,)),
            "weight_scale": TensorSpec(torch.float32, (shape[0],)),
        }

    def store(self, solution: Solution) -> dict[str, torch.Tensor]:
        packed = pack_nibbles(solution.qdata.view(torch.uint8) & 15, high_first=False)
        return {"weight": packed.view(torch.int8), "weight_scale": solution.scale.flatten()}

    def dequantize(self, parts: Parts, shape: tuple[int, ...]) -> torch.Tensor:
        values = unpack_nibbles(parts["weight"], high_first=False).view(torch.int8)
        signed = torch.where(values < 8, values, values - 16).float()
        return self.restore_weight(signed * parts["weight_scale"].float().reshape(-1, 1))

    def activation_elements(self, capability: tuple[int, int] | None = None) -> ElementFormat:
        has_int4 = capability is None or _FIRST_INT4 <= capability < _FIRST_WITHOUT
        return INT4 if self.linear_dtype == "int4" and has_int4 else INT8

    def __str__(self) -> str:
        return super().__str__() + (", linear_dtype int4" if self.linear_dtype == "int4" else "")


FORMATS = (
    Format(
        name="convrot_w4a4",
        elements=INT4,
        granularities={"row": {}},
        codec=ConvRotW4A4Codec,
        note="4-bit integer of the rotated weight, one scale per row; activations INT8, or INT4 on SM 7.5 and 8.x",
        stock_since="0.28",
        uncalibrated_error=0.155,
        activations="token",
        rotated=("row",),
        always_rotated=True,
        storage=torch.int8,
        banks=True,
    ),
)
