"""Levels: the few integers that a quantized value of a group can be, where a format stores indices of them.

W4A8 stores 4-bit indices of codes, and W6A8 6-bit integers; ComfyUI multiplies round(code · scale of the group), an INT8
value, so that is the quantized value here.
"""

from dataclasses import dataclass, replace

import torch

from ...kernels.reference import enclosing_levels, round_to_levels
from .elements import INT8

__all__ = ["GroupLevels"]


@dataclass(frozen=True)
class GroupLevels:
    """Levels of the groups of ``columns`` adjacent weights: round(codes · scale), ties to even, clamped to ±127.

    Attributes:
        codes: float32 (k,), ascending.
        columns: length of a group; divides the input channels.
        scale: float32 (out, groups), not negative, representable in the file; None while it is not yet chosen.
    """

    codes: torch.Tensor
    columns: int
    scale: torch.Tensor | None = None

    def with_scale(self, scale: torch.Tensor, codes: torch.Tensor | None = None) -> "GroupLevels":
        """These groups with a scale, and other codes where they are given."""
        return replace(self, scale=scale, codes=self.codes if codes is None else codes)

    def rows(self, rows: slice | torch.Tensor) -> "GroupLevels":
        """The levels of some rows."""
        return replace(self, scale=self._chosen[rows])

    def to(self, device: torch.device) -> "GroupLevels":
        """The levels on another device."""
        return replace(self, codes=self.codes.to(device), scale=self._chosen.to(device))

    def nearest(self, scaled: torch.Tensor) -> torch.Tensor:
        """The nearest level of each value, float32 (rows, in); ``scaled``: float32, as many rows as :attr:`scale`."""
        grouped = scaled.unflatten(1, (-1, self.columns))
        return round_to_levels(grouped, self.codes, self._chosen, INT8.max).flatten(1)

    def neighbours(self, scaled: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The two levels that enclose each value, as :meth:`~.elements.ElementFormat.neighbours` returns elements."""
        grouped = scaled.unflatten(1, (-1, self.columns))
        below, above = enclosing_levels(grouped, self.codes, self._chosen, INT8.max)
        return below.flatten(1), above.flatten(1)

    def indices(self, qdata: torch.Tensor) -> torch.Tensor:
        """The index of each quantized value among the codes, uint8 (out, in), the lowest of equal levels."""
        grouped = qdata.float().unflatten(1, (-1, self.columns)).contiguous()
        return torch.searchsorted(self._levels(), grouped).flatten(1).to(torch.uint8)

    def _levels(self) -> torch.Tensor:
        """All levels, float32 (rows, groups, k), ascending."""
        return (self._chosen[..., None] * self.codes).round_().clamp_(-INT8.max, INT8.max)

    @property
    def _chosen(self) -> torch.Tensor:
        assert self.scale is not None
        return self.scale
