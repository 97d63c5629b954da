"""Triton implementations, under the names of :mod:`..reference`."""

from .rounding import round_block, scale_errors

__all__ = ["round_block", "scale_errors"]
