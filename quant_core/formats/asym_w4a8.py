"""W4A8 and W6A8: indices into levels of INT8, scaled per group and per row, of the rotated weight.

Source: comfy-kitchen, ``AsymW4A8Int8Layout``, whose file layout this is.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from ... import kernels
from ...kernels.reference import scale_levels
from .codec import Codec, Format, Parts, ShapedTensor, TensorSpec, read_count
from .elements import INT8
from .levels import GroupLevels
from .packing import pack_nibbles, unpack_nibbles
from .rotation import Rotation
from .scales import ScaleGroups
from .solution import Solution
from .space import SolveSpace

__all__ = ["FORMATS", "AsymW4A8Codec"]

_GROUP = 16
# Lloyd-Max levels of the weights of a Gaussian group of 16 relative to their largest magnitude: comfy-kitchen's table, which
# its kernels have built in.
_CODEBOOK = torch.tensor(
    [
        *(-0.980602, -0.794529, -0.638165, -0.500986, -0.377321, -0.263187, -0.155210, -0.050720),
        *(0.052541, 0.156985, 0.265284, 0.379533, 0.502636, 0.638953, 0.794876, 0.980671),
    ]
)
_INTEGERS = torch.arange(-31.0, 32.0)  # of 6 bits
_ZERO = {4: 8, 6: 32}  # stored index of the code 0, without a codebook
_COLUMNS = {4: 16, 6: 32}  # input channels are a multiple of this


@dataclass(frozen=True)
class AsymW4A8Codec(Codec):
    """W = R · weight_s_channel · round(weight_s_rel · weight_codebook[index]), clamped to ±127 in between.

    ``weight``: int8 (M, N/2), the even column in the low four bits, with 6 bits followed by N/4 bytes with the upper two bits
    of four adjacent columns; ``weight_s_rel``: E4M3 or float32 (M, N/group_size); ``weight_s_channel``: float32 (M,);
    ``weight_codebook``: float32 (16,), optional, index − 8 without it, index − 32 with 6 bits.

    Attributes:
        bits: of an index.
    """

    bits: int = 4

    options: ClassVar[Mapping[str, tuple[object, ...]]] = {"bits": (4, 6)}
    signed = ("weight_codebook",)

    @property
    def weight_bits(self) -> int:
        return self.bits

    @property
    def kitchen_since(self) -> str | None:
        return "0.2.36" if self.bits == 6 else None

    @property
    def magnitude_bits(self) -> int:
        return 0  # codebooks have no zero

    @property
    def group_size(self) -> int | None:
        return self.block_size or _GROUP

    @property
    def config(self) -> dict[str, object]:
        rotation = self.rotation.size if self.rotation else 0
        return {"format": self.format.name, "group_size": self.group_size, "convrot_groupsize": rotation}

    @classmethod
    def from_config(cls, format: Format, config: Mapping[str, object], granularity: str) -> Codec:
        rotation, size = (
            Rotation(read_count(config, "convrot_groupsize", 256)),
            read_count(config, "group_size", _GROUP),
        )
        return cls(format, granularity, block_size=None if size == _GROUP else size, rotation=rotation)

    def of_tensors(self, find: Callable[[str], ShapedTensor | None]) -> Codec:
        weight, scale = find("weight"), find("weight_s_rel")
        if weight is None or scale is None or not weight.shape or not scale.shape:
            return self
        columns = scale.shape[-1] * (self.group_size or _GROUP)
        return replace(self, bits=6 if weight.shape[-1] * 8 == columns * 6 else 4)

    def admits(self, shape: tuple[int, ...]) -> str | None:
        multiple = _COLUMNS[self.bits]
        if shape[1] % multiple:
            return f"its {shape[1]} input channels are not a multiple of {multiple}"
        return super().admits(shape)

    def weight_shape(self, stored: tuple[int, ...], config: Mapping[str, object]) -> tuple[int, int]:
        rows, packed = super().weight_shape(stored, config)
        return rows, packed * 8 // self.bits

    def groups(self, shape: tuple[int, ...]) -> ScaleGroups:
        return ScaleGroups(shape[0], shape[1], 1, shape[1])

    def solve_space(self, shape: tuple[int, ...]) -> SolveSpace:
        levels = GroupLevels(_CODEBOOK if self.bits == 4 else _INTEGERS, self.group_size or _GROUP)
        return replace(super().solve_space(shape), levels=levels)

    def specs(self, shape: tuple[int, ...]) -> dict[str, TensorSpec]:
        out, inner = shape
        return {
            "weight": TensorSpec(self.format.storage_dtype, (out, inner * self.bits // 8), views=(torch.uint8,)),
            "weight_s_rel": TensorSpec(
                torch.float8_e4m3fn, (out, inner // (self.group_size or 1)), views=(torch.uint8, torch.float32)
            ),
            "weight_s_channel": TensorSpec(torch.float32, (out,)),
        }

    def optional(self, shape: tuple[int, ...]) -> dict[str, TensorSpec]:
        return {"weight_codebook": TensorSpec(torch.float32, (16,))} if self.bits == 4 else {}

    def file_specs(self, shape: tuple[int, ...], *, calibrated: bool = False) -> dict[str, TensorSpec]:
        return {**super().file_specs(shape, calibrated=calibrated), **self.optional(shape)}

    def store(self, solution: Solution) -> dict[str, torch.Tensor]:
        levels = solution.levels
        assert levels is not None and levels.scale is not None
        indices = levels.indices(solution.qdata)
        tensors = {
            "weight_s_rel": levels.scale.to(torch.float8_e4m3fn),
            "weight_s_channel": solution.scale.flatten(),
        }
        if self.bits == 6:
            return {"weight": _pack_six_bits(indices + 1).view(torch.int8), **tensors}
        packed = pack_nibbles(indices, high_first=False)
        return {"weight": packed.view(torch.int8), **tensors, "weight_codebook": levels.codes}

    def dequantize(self, parts: Parts, shape: tuple[int, ...]) -> torch.Tensor:
        return self.restore_weight(self.decode_int8(parts).float() * parts["weight_s_channel"].float().reshape(-1, 1))

    def decode_int8(self, parts: Parts) -> torch.Tensor:
        """The INT8 values (out, in) that ComfyUI's kernels multiply; ``weight_s_channel`` has their scale per row.

        Raises:
            ValueError: the tensors contradict the group size.
        """
        packed, scale, codebook = parts["weight"], parts["weight_s_rel"], parts.get("weight_codebook")
        scale = scale.view(torch.float8_e4m3fn) if scale.dtype is torch.uint8 else scale.float()
        columns = packed.shape[-1] * 8 // self.bits
        if scale.shape[-1] * (self.group_size or 0) != columns:
            raise ValueError(
                f"its group_size {self.group_size} contradicts {scale.shape[-1]} scales for {columns} columns"
            )
        if self.bits == 6:
            return scale_levels(_unpack_six_bits(packed).view(torch.int8) - _ZERO[6], scale)
        return kernels.expand_w4a8_weight(packed, scale, codebook if codebook is None else codebook.float())

    def __str__(self) -> str:
        return f"{super().__str__()}, {self.bits} bits"


def _pack_six_bits(values: torch.Tensor) -> torch.Tensor:
    """uint8 (rows, n), values 0…63 → uint8 (rows, 3n/4): the low four bits in pairs, then the upper two bits of four columns."""
    upper = (values >> 4).unflatten(1, (-1, 4))
    shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8, device=values.device)
    planes = [pack_nibbles(values & 15, high_first=False), (upper << shifts).sum(dim=-1, dtype=torch.uint8)]
    return torch.cat(planes, dim=1)


def _unpack_six_bits(packed: torch.Tensor) -> torch.Tensor:
    """Inverse of :func:`_pack_six_bits`, of any one-byte dtype, as uint8."""
    nibbles = packed.shape[1] * 2 // 3
    shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8, device=packed.device)
    upper = (packed[:, nibbles:].view(torch.uint8)[..., None] >> shifts) & 3
    return unpack_nibbles(packed[:, :nibbles].contiguous(), high_first=False) | upper.flatten(1) << 4


FORMATS = (
    Format(
        name="asym_w4a8_int8",
        elements=INT8,
        granularities={"group": {}},
        codec=AsymW4A8Codec,
        note="4-bit or 6-bit indices of the rotated weight in groups of 16, multiplied as INT8 from SM 8.0",
        stock_since="0.31",
        uncalibrated_error=0.073,
        activations="token",
        rotated=("group",),
        always_rotated=True,
        storage=torch.int8,
    ),
)
