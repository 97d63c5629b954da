"""Arithmetic of an element format, as kernels need it."""

from typing import NamedTuple

__all__ = ["ElementArithmetic"]


class ElementArithmetic(NamedTuple):
    """Spacing and range of the values that an element format represents.

    A value x is representable if it is a multiple of max(2^(⌊log2|x|⌋ − mantissa), smallest) and |x| ≤ largest.

    Attributes:
        mantissa: stored mantissa bits of a floating-point format; −1 for an integer format, whose spacing is 1.
        smallest: smallest spacing (floating point: the spacing of subnormals).
        largest: largest magnitude; larger values are clamped.
    """

    mantissa: int
    smallest: float
    largest: float
