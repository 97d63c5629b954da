"""The roundings a user can name."""

from collections.abc import Mapping

from ..errors import UnknownNameError

__all__ = ["ROUNDINGS", "check_rounding"]

ROUNDINGS: Mapping[str, str] = {
    "auto": "nearest code, under the scale that a search finds best",
    "nearest": "nearest code, under the scale that maps the largest weight onto the grid's end",
}


def check_rounding(name: str) -> None:
    """Raise :class:`UnknownNameError` unless there is a rounding of that name."""
    if name not in ROUNDINGS:
        raise UnknownNameError("rounding", name, ROUNDINGS)
