"""The space a solver works in: representable values of one weight under the scales of its groups."""

from dataclasses import dataclass, replace
from typing import Protocol

import torch

from .elements import ElementFormat
from .levels import GroupLevels
from .scales import ScaleFormat, ScaleGroups

__all__ = ["Basis", "SolveSpace"]


class Basis(Protocol):
    """A change of basis B of the input channels: the stored weight W·B⁻ᵀ multiplies activations x·B.

    Results are float32.
    """

    def apply(self, values: torch.Tensor, /) -> torch.Tensor:
        """values·B along the last dimension (in)."""
        ...

    def restore(self, values: torch.Tensor, /) -> torch.Tensor:
        """values·B⁻¹ along the last dimension (in)."""
        ...

    def apply_weight(self, weight: torch.Tensor, /) -> torch.Tensor:
        """W·B⁻ᵀ of a weight (out, in)."""
        ...

    def restore_weight(self, weight: torch.Tensor, /) -> torch.Tensor:
        """W·Bᵀ of a stored weight (out, in)."""
        ...

    def apply_hessian(self, hessian: torch.Tensor, /) -> torch.Tensor:
        """Bᵀ·H·B: the Hessian (in, in) of the activations x·B."""
        ...


@dataclass(frozen=True)
class SolveSpace:
    """All that a solver needs to know of a format, for a weight of one shape.

    Attributes:
        elements: the numbers a quantized value can be.
        groups: the parts of the weight that share a scale.
        scales: the numbers a scale can be.
        basis: that of the stored weight, None for the original one.
        levels: the elements that a value of each group can be, or None for all.
    """

    elements: ElementFormat
    groups: ScaleGroups
    scales: ScaleFormat
    basis: Basis | None = None
    levels: GroupLevels | None = None

    def with_levels(self, levels: GroupLevels) -> "SolveSpace":
        """The space with chosen levels."""
        return replace(self, levels=levels)

    def of_rows(self, rows: slice | torch.Tensor) -> "SolveSpace":
        """The space with the levels of some rows."""
        return replace(self, levels=self.levels.rows(rows)) if self.levels else self

    def divisor(self, scale: torch.Tensor, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """What rows start:stop of the weight are divided by, broadcastable to (rows, in): their scale, 1 where that is 0."""
        spread = self.groups.spread(scale, start, stop)
        return spread if self.scales.continuous else torch.where(spread > 0, spread, torch.ones_like(spread))

    def encode(self, rows: torch.Tensor, scale: torch.Tensor, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Round rows start:stop (float32) to the nearest element: quantized values (rows, in); ``scale``: float32 (*counts)."""
        scaled = rows / self.divisor(scale, start, stop)
        if not self.scales.continuous:
            scaled = torch.where(self.groups.spread(scale, start, stop) > 0, scaled, torch.zeros_like(scaled))
        if self.levels:
            return self.levels.rows(slice(start, stop)).nearest(scaled).to(self.elements.dtype)
        return self.elements.encode(scaled)

    def neighbours(
        self, scaled: torch.Tensor, start: int = 0, stop: int | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See :meth:`~.elements.ElementFormat.neighbours`, of rows start:stop that are divided by their scales."""
        if self.levels:
            return self.levels.rows(slice(start, stop)).neighbours(scaled)
        return self.elements.neighbours(scaled)

    def decode(self, qdata: torch.Tensor, scale: torch.Tensor, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """The values of quantized rows start:stop as float32 (rows, in), in the stored basis."""
        return qdata.float().mul_(self.groups.spread(scale, start, stop))

    def round_nearest(self, values: torch.Tensor) -> torch.Tensor:
        """``values`` (float32, the shape of the space) after rounding to nearest under the amax scales, float32."""
        amax = self.groups.join_rows(self.groups.row_amax(values), torch.amax)
        scale, _ = self.scales.from_amax(amax, self.elements.max)
        return self.decode(self.encode(values, scale), scale)
