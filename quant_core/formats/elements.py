"""Element formats: the numbers that one quantized value can represent, apart from how a file packs them."""

from dataclasses import dataclass

import torch

from ...kernels.element_format import ElementArithmetic
from ...kernels.reference import element_step, round_to_element

__all__ = ["E2M1", "E4M3", "E5M2", "INT4", "INT8", "ElementFormat"]


@dataclass(frozen=True)
class ElementFormat:
    """A symmetric set of representable numbers.

    Attributes:
        name: as users know it, for example "E4M3".
        bits: bits per value in a file.
        dtype: dtype of a tensor of quantized values, one element per value, in which each of them is exact.
        arithmetic: mantissa bits, smallest step and largest magnitude, as kernels take them.
    """

    name: str
    bits: int
    dtype: torch.dtype
    arithmetic: ElementArithmetic

    @property
    def max(self) -> float:
        """Largest representable magnitude; larger values clamp."""
        return self.arithmetic.largest

    @property
    def smallest_normal(self) -> float:
        """Smallest magnitude with all mantissa bits; for floating elements."""
        return self.arithmetic.smallest * 2.0**self.arithmetic.mantissa

    @property
    def floating(self) -> bool:
        """Steps grow with magnitude, so a scale matters only modulo a power of two."""
        return self.arithmetic.mantissa >= 0

    def encode(self, scaled: torch.Tensor) -> torch.Tensor:
        """Round to the nearest representable number, ties to even. ``scaled``: float32 of any shape; returns :attr:`dtype`."""
        clamped = scaled.clamp(-self.max, self.max)
        return (clamped if self._rounded_by_cast else round_to_element(clamped, self.arithmetic)).to(self.dtype)

    def neighbours(self, scaled: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The two representable numbers (float32) that enclose each value, the lower one first.

        For a representable value one of them is the value itself, the other is farther from zero. Beyond the largest
        magnitude both are the largest magnitude.
        """
        magnitude = scaled.abs().clamp_max_(self.max)
        step = element_step(magnitude, self.arithmetic)
        inner = (magnitude / step).floor_() * step
        outer = (inner + step).clamp_max_(self.max)
        negative = scaled < 0
        return torch.where(negative, -outer, inner), torch.where(negative, -inner, outer)

    @property
    def _rounded_by_cast(self) -> bool:
        """The numbers of :attr:`dtype` are exactly these."""
        return self.dtype.is_floating_point and torch.finfo(self.dtype).max == self.max


E4M3 = ElementFormat("E4M3", 8, torch.float8_e4m3fn, ElementArithmetic(mantissa=3, smallest=2.0**-9, largest=448.0))
E5M2 = ElementFormat("E5M2", 8, torch.float8_e5m2, ElementArithmetic(mantissa=2, smallest=2.0**-16, largest=57344.0))
# OCP Microscaling Formats (MX) v1.0, section 5.3.3. Each of its numbers is one of E4M3, whose dtype holds them.
E2M1 = ElementFormat("E2M1", 4, torch.float8_e4m3fn, ElementArithmetic(mantissa=1, smallest=0.5, largest=6.0))
# Symmetric: −128 and −8 are left out, as in every integer matmul kernel that ComfyUI uses.
INT8 = ElementFormat("INT8", 8, torch.int8, ElementArithmetic(mantissa=-1, smallest=1.0, largest=127.0))
INT4 = ElementFormat("INT4", 4, torch.int8, ElementArithmetic(mantissa=-1, smallest=1.0, largest=7.0))
