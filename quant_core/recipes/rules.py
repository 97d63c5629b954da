"""What a tensor must be to be quantized at all, and the size heuristics of ``--heur``: tables, first match wins."""

from collections.abc import Callable

from ..sources import TensorInfo
from ..sources.dtypes import SOURCE_DTYPES

__all__ = ["eligibility", "heuristic"]

_ELIGIBLE: tuple[tuple[Callable[[str, TensorInfo], bool], str], ...] = (
    (lambda name, info: not name.endswith(".weight"), "not a weight"),
    (lambda name, info: 0 in info.shape, "empty"),
    (lambda name, info: len(info.shape) != 2, "not a matrix: only linear layers are read as quantized"),
    (lambda name, info: info.dtype not in SOURCE_DTYPES, "not stored as fp16, bf16 or fp32"),
)

# (shorter side, longer side, side of a block) → whether a matrix gains little, and why.
_HEURISTICS: tuple[tuple[Callable[[int, int, int], bool], str], ...] = (
    (lambda small, large, block: small < block, "a side shorter than {block}"),
    (lambda small, large, block: small % block or large % block, "a side that {block} does not divide"),
    (
        lambda small, large, block: large / small > 4 and small < 5120,
        "aspect ratio above 4 and the shorter side below 5120",
    ),
    (
        lambda small, large, block: small * large < 15_000_000 and large / small < 2,
        "fewer than 15 million parameters, nearly square",
    ),
    (lambda small, large, block: large < 4096, "longer side below 4096"),
)


def eligibility(name: str, info: TensorInfo) -> str | None:
    """Why this tensor can never be quantized, or None."""
    return next((reason for rule, reason in _ELIGIBLE if rule(name, info)), None)


def heuristic(info: TensorInfo, block: int) -> str | None:
    """Why ``--heur`` keeps a matrix of this shape when blocks have that side, or None. The rules are those users know from other tools."""
    small, large = sorted(info.shape)
    return next(
        (f"heur: {reason.format(block=block)}" for rule, reason in _HEURISTICS if rule(small, large, block)), None
    )
