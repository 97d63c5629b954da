"""The solution of the rounding of one weight."""

from dataclasses import dataclass, replace

import torch

from ..deprecated import renamed_attribute
from .levels import GroupLevels

__all__ = ["Solution"]


@dataclass(frozen=True)
class Solution:
    """How a weight was rounded, and the error that this makes.

    Attributes:
        solver: the solver that chose the quantized values; "nearest" for round to nearest.
        qdata: quantized values (out, in) in the element format's dtype, in the stored basis.
        scale: effective scales, float32 (*counts).
        parent: parent level of the scales, None where there is one level.
        weight_error: ‖Ŵ − W‖/‖W‖, 0 for an all-zero weight.
        gain: the loss relative to that of round to nearest; below 1 is better, None when nothing was compared.
        output_error: √(tr(E·H·Eᵀ)/tr(W·H·Wᵀ)), None without a Hessian H.
        levels: those of the quantized values, for formats that store indices of them.
        dampening: λ of the Hessian that GPTQ used, relative to its mean diagonal; None for other solvers.
    """

    solver: str
    qdata: torch.Tensor
    scale: torch.Tensor
    parent: torch.Tensor | None
    weight_error: float
    gain: float | None = None
    output_error: float | None = None
    levels: GroupLevels | None = None
    dampening: float | None = None

    winner = renamed_attribute("winner", "solver")

    def to(self, device: torch.device) -> "Solution":
        """The solution with its tensors on a device."""
        moved = {
            name: value.to(device)
            for name in ("qdata", "scale", "parent", "levels")
            if (value := getattr(self, name)) is not None
        }
        return replace(self, **moved)
