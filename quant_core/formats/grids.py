"""Number grids: the values a code can mean before it is scaled."""

from dataclasses import dataclass

import torch

__all__ = ["Grid", "E4M3", "INT8"]


@dataclass(frozen=True)
class Grid:
    """A symmetric set of representable numbers.

    Attributes:
        dtype: dtype of the codes as they stand in a file.
        max: largest representable magnitude; larger values clamp.
    """

    dtype: torch.dtype
    max: float

    @property
    def floating(self) -> bool:
        """Steps grow with magnitude, so a scale matters only modulo a power of two."""
        return self.dtype.is_floating_point

    def encode(self, scaled: torch.Tensor) -> torch.Tensor:
        """Nearest code of each value, ties to even. ``scaled``: float32, any shape."""
        clamped = scaled.clamp(-self.max, self.max)
        return (clamped if self.floating else clamped.round_()).to(self.dtype)


E4M3 = Grid(torch.float8_e4m3fn, 448.0)
# Symmetric: −128 is left out, as in every int8 matmul kernel ComfyUI uses.
INT8 = Grid(torch.int8, 127.0)
