"""Codec of the 8-bit formats with one level of float32 scales: quantized values as they are, and one scale tensor."""

from dataclasses import replace

import torch

from .codec import Codec, Parts, TensorSpec
from .scales import CastFloat32
from .solution import Solution
from .space import SolveSpace

__all__ = ["ScaledCodec"]


class ScaledCodec(Codec):
    """W = scale · qdata, rotated back where ConvRot is on.

    ``weight``: (out, in) in the element format's dtype; ``weight_scale``: float32, () per tensor, (out, 1) per row,
    (⌈out/size⌉, ⌈in/size⌉) per block; ``input_scale``: float32 (), optional where activations have a static scale.
    """

    positive = ("weight_scale", "input_scale")

    def scale_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of ``weight_scale`` for a weight (out, in)."""
        return () if self.granularity == "tensor" else self.groups(shape).counts

    @property
    def cast_scale(self) -> str | None:
        return "weight_scale" if self.granularity == "tensor" and self.format.elements.floating else None

    def solve_space(self, shape: tuple[int, ...]) -> SolveSpace:
        space = super().solve_space(shape)
        return replace(space, scales=CastFloat32(space.elements.smallest_normal)) if self.cast_scale else space

    def specs(self, shape: tuple[int, ...]) -> dict[str, TensorSpec]:
        return {
            "weight": TensorSpec(self.format.storage_dtype, tuple(shape)),
            "weight_scale": TensorSpec(torch.float32, self.scale_shape(shape)),
        }

    def store(self, solution: Solution) -> dict[str, torch.Tensor]:
        shape = (solution.qdata.shape[0], solution.qdata.shape[1])
        return {"weight": solution.qdata, "weight_scale": solution.scale.reshape(self.scale_shape(shape))}

    def dequantize(self, parts: Parts, shape: tuple[int, ...]) -> torch.Tensor:
        space = self.solve_space(shape)
        scale = parts["weight_scale"].float().reshape(space.groups.counts)
        return self.restore_weight(space.decode(parts["weight"], scale))
