"""Which tensors can be quantized, and the size heuristics of ``--heur``: tables, the first match decides."""

from collections.abc import Callable

from ..sources import TensorInfo
from ..sources.dtypes import SOURCE_DTYPES
from .experts import is_bank

__all__ = ["check_eligibility", "check_heuristic"]

_ELIGIBLE: tuple[tuple[Callable[[str, TensorInfo], bool], str], ...] = (
    (is_bank, "bank of experts: stock ComfyUI has no loader for quantized experts of this model"),
    (lambda name, info: not name.endswith(".weight"), "not a weight"),
    (lambda name, info: 0 in info.shape, "empty"),
    (lambda name, info: len(info.shape) != 2, "not a matrix: ComfyUI reads only linear layers quantized"),
    (lambda name, info: info.dtype not in SOURCE_DTYPES, "not stored as fp16, bf16 or fp32"),
)

# (shorter side, longer side, block size) → whether a matrix gains little, and the reason.
_HEURISTICS: tuple[tuple[Callable[[int, int, int], bool], str], ...] = (
    (lambda small, large, block: small < block, "a side shorter than {block}"),
    (lambda small, large, block: bool(small % block or large % block), "a side that {block} does not divide"),
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


def check_eligibility(name: str, info: TensorInfo) -> str | None:
    """Why this tensor cannot be quantized; None if it can. ``info``: of one expert, for a bank that ComfyUI reads quantized."""
    return next((reason for rule, reason in _ELIGIBLE if rule(name, info)), None)


def check_heuristic(info: TensorInfo, block: int) -> str | None:
    """Why ``--heur`` keeps a matrix of this shape, for this block size; None if it does not. The rules are those of other tools."""
    small, large = sorted(info.shape)
    return next(
        (f"heur: {reason.format(block=block)}" for rule, reason in _HEURISTICS if rule(small, large, block)), None
    )
