"""NVFP4: E2M1 elements, an E4M3 scale per 16 columns, one float32 scale per tensor.

Source: NVIDIA, "Introducing NVFP4", and ComfyUI's ``TensorCoreNVFP4Layout``, whose file layout this is.
"""

from collections.abc import Mapping
from dataclasses import replace

import torch

from .codec import Codec, Format, Parts, TensorSpec
from .elements import E2M1
from .packing import pack_nibbles, pad_matrix, round_up, tile_scales, tiled_shape, unpack_nibbles, untile_scales
from .padded import padded_config, padded_shape
from .scales import CAST_TWO_LEVEL_E4M3, TWO_LEVEL_E4M3
from .smoothing import SMOOTHING_KEY, Smoothing
from .solution import Solution
from .space import SolveSpace

__all__ = ["E2M1_VALUES", "FORMATS", "NVFP4Codec"]

_GROUP = 16
_PADDING = 16  # rows and columns of the stored weight are multiples of this
_MAGNITUDES = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])  # of the codes 0…7; code + 8 is the negative
E2M1_VALUES = torch.cat([_MAGNITUDES, -_MAGNITUDES])


class NVFP4Codec(Codec):
    """W = weight_scale_2 · weight_scale · E2M1, multiplied by ``pre_quant_scale`` per input channel where there is one.

    ``weight``: uint8 (M, N/2), the even column in the high four bits, M and N padded to multiples of 16;
    ``weight_scale``: E4M3 in cuBLAS's tiles; ``weight_scale_2``: float32 (). ComfyUI multiplies the activations by
    ``pre_quant_scale`` (N,) before it quantizes them.

    ``input_scale``, float32 (), replaces the scale that ComfyUI computes of all activations of a call, amax/(448·6). It is
    read and not written. It would save one pass over the activations and not reduce their error: those above 448·6 times
    the scale clip, as a LoRA or another sampler may make them, and headroom against that takes octaves from the scales of
    groups. Of the 15 octaves of normal E4M3 numbers a factor of 16 leaves 11.
    """

    scales = TWO_LEVEL_E4M3
    positive = ("weight_scale_2", "input_scale")
    signed = (SMOOTHING_KEY,)

    @property
    def magnitude_bits(self) -> int:
        return 0x77  # of two elements

    @property
    def cast_scale(self) -> str | None:
        return "weight_scale_2"

    def solve_space(self, shape: tuple[int, ...]) -> SolveSpace:
        return replace(super().solve_space(shape), scales=CAST_TWO_LEVEL_E4M3)

    def layer_config(self, shape: tuple[int, ...]) -> dict[str, object]:
        return self.config | padded_config(shape, _PADDING)

    def weight_shape(self, stored: tuple[int, ...], config: Mapping[str, object]) -> tuple[int, int]:
        rows, packed = super().weight_shape(stored, config)
        return padded_shape((rows, 2 * packed), config)

    def specs(self, shape: tuple[int, ...]) -> dict[str, TensorSpec]:
        rows, columns = (round_up(side, _PADDING) for side in shape)
        return {
            "weight": TensorSpec(self.format.storage_dtype, (rows, columns // 2)),
            "weight_scale": TensorSpec(torch.float8_e4m3fn, tiled_shape(rows, columns // _GROUP), views=(torch.uint8,)),
            "weight_scale_2": TensorSpec(torch.float32, ()),
        }

    def optional(self, shape: tuple[int, ...]) -> dict[str, TensorSpec]:
        return {
            "input_scale": TensorSpec(torch.float32, ()),
            SMOOTHING_KEY: TensorSpec(torch.float32, (shape[1],), views=(torch.bfloat16, torch.float16)),
        }

    def of_values(self, parts: Parts) -> Codec:
        scale = parts.get(SMOOTHING_KEY)
        return self if scale is None else replace(self, smoothing=Smoothing(scale.float()))

    def scale_values(self, suffix: str, tensor: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
        if suffix != "weight_scale":
            return super().scale_values(suffix, tensor, shape)
        rows, columns = (round_up(side, _PADDING) for side in shape)
        return _group_scales(tensor, rows, columns // _GROUP)

    def store(self, solution: Solution) -> dict[str, torch.Tensor]:
        scale, parent = solution.scale, solution.parent
        assert parent is not None
        smoothing = {SMOOTHING_KEY: self.smoothing.scale} if self.smoothing else {}
        values = pad_matrix(solution.qdata, _PADDING).float()
        codes = torch.bucketize(values.abs(), _MAGNITUDES.to(values.device)).to(torch.uint8)
        codes |= torch.signbit(values).to(torch.uint8) << 3
        return {
            "weight": pack_nibbles(codes, high_first=True),
            "weight_scale": tile_scales((scale / parent).to(torch.float8_e4m3fn)),
            "weight_scale_2": parent,
            **smoothing,
        }

    def dequantize(self, parts: Parts, shape: tuple[int, ...]) -> torch.Tensor:
        codes = unpack_nibbles(parts["weight"], high_first=True)
        scale = _group_scales(parts["weight_scale"], codes.shape[0], codes.shape[1] // _GROUP)
        effective = parts["weight_scale_2"].float() * scale
        values = E2M1_VALUES.to(codes.device)[codes.long()].unflatten(1, (-1, _GROUP)) * effective[..., None]
        weight = values.flatten(1)[: shape[0], : shape[1]]
        return self.of_values(parts).restore_weight(weight)


def _group_scales(tiled: torch.Tensor, rows: int, groups: int) -> torch.Tensor:
    """The scales of groups, float32 (rows, groups), from their tiles."""
    return untile_scales(tiled, rows, groups).view(torch.float8_e4m3fn).float()


FORMATS = (
    Format(
        name="nvfp4",
        elements=E2M1,
        granularities={"group": {}},
        codec=NVFP4Codec,
        note="4-bit float in groups of 16 with two levels of scales; runs on FP4 tensor cores from SM 10.0, is dequantized on older cards",
        stock_since="0.8",
        uncalibrated_error=0.095,
        activations="group",
        native_since=(10, 0),
        group_size=_GROUP,
        smoothed_since="0.30",
        storage=torch.uint8,
        banks=True,
    ),
)
