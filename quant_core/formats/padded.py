"""Weights that are stored with more rows and columns than they have; the JSON key ``orig_shape`` holds their own shape."""

from collections.abc import Mapping

from .packing import round_up

__all__ = ["padded_config", "padded_shape"]

_KEY = "orig_shape"  # as other tools write it; ComfyUI takes the shape from its module


def padded_config(shape: tuple[int, ...], multiple: int) -> dict[str, object]:
    """The JSON key of a weight (out, in) that is padded to multiples of ``multiple``; empty where it needs no padding."""
    return {_KEY: list(shape)} if any(round_up(side, multiple) != side for side in shape) else {}


def padded_shape(stored: tuple[int, int], config: Mapping[str, object]) -> tuple[int, int]:
    """(out, in) of a weight that is stored as a matrix of that shape. Raises ValueError where the JSON contradicts it."""
    given = config.get(_KEY, stored)
    if (
        not isinstance(given, (list, tuple))
        or [*map(type, given)] != [int, int]
        or not all(0 < own <= padded for own, padded in zip(given, stored, strict=True))
    ):
        raise ValueError(f"its JSON has {_KEY}={given}, and the weight is stored as {stored}")
    return given[0], given[1]
