"""The arithmetic of a number grid, as kernels need it."""

from typing import NamedTuple

__all__ = ["GridArithmetic"]


class GridArithmetic(NamedTuple):
    """A value x lies on the grid when it is a multiple of max(2^(⌊log2|x|⌋ − mantissa), smallest) and |x| ≤ largest.

    Attributes:
        mantissa: stored mantissa bits of a floating grid; −1 for integers, whose step is 1 everywhere.
        smallest: the smallest step (of a floating grid: its subnormal spacing).
        largest: the largest magnitude; larger values clamp.
    """

    mantissa: int
    smallest: float
    largest: float
