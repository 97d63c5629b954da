"""Number grids: the values a code can mean before it is scaled."""

from dataclasses import dataclass

import torch

from ...kernels.element_format import ElementArithmetic
from ...kernels.reference import element_step

__all__ = ["Grid", "E4M3", "E5M2", "INT8"]


@dataclass(frozen=True)
class Grid:
    """A symmetric set of representable numbers.

    Attributes:
        dtype: dtype of the codes as they stand in a file.
        arithmetic: mantissa bits, smallest step and largest magnitude, as kernels take them.
    """

    dtype: torch.dtype
    arithmetic: ElementArithmetic

    @property
    def max(self) -> float:
        """Largest representable magnitude; larger values clamp."""
        return self.arithmetic.largest

    @property
    def floating(self) -> bool:
        """Steps grow with magnitude, so a scale matters only modulo a power of two."""
        return self.dtype.is_floating_point

    def encode(self, scaled: torch.Tensor) -> torch.Tensor:
        """Nearest code of each value, ties to even. ``scaled``: float32, any shape."""
        clamped = scaled.clamp(-self.max, self.max)
        return (clamped if self.floating else clamped.round_()).to(self.dtype)

    def neighbours(self, scaled: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The two neighbouring grid values that enclose each value (float32), the lower one first.

        Of a value on the grid one is the value itself, the other lies farther from zero; beyond the grid's end both
        are its end.
        """
        magnitude = scaled.abs().clamp_max_(self.max)
        step = element_step(magnitude, self.arithmetic)
        inner = (magnitude / step).floor_() * step
        outer = (inner + step).clamp_max_(self.max)
        negative = scaled < 0
        return torch.where(negative, -outer, inner), torch.where(negative, -inner, outer)


E4M3 = Grid(torch.float8_e4m3fn, ElementArithmetic(mantissa=3, smallest=2.0**-9, largest=448.0))
E5M2 = Grid(torch.float8_e5m2, ElementArithmetic(mantissa=2, smallest=2.0**-16, largest=57344.0))
# Symmetric: −128 is left out, as in every int8 matmul kernel ComfyUI uses.
INT8 = Grid(torch.int8, ElementArithmetic(mantissa=-1, smallest=1.0, largest=127.0))
