"""Matrices that several formats of one layer need: computed once, and kept while their memory is small."""

from collections.abc import Callable, Hashable
from typing import TypeVar

import torch

__all__ = ["MatrixMemo", "recall"]

_SHARE = 4  # of the free memory of a GPU, one part is used
_CPU_BYTES = 1 << 31

T = TypeVar("T")


class MatrixMemo:
    """Hessians of one layer in each basis, and their factorizations, by what they are computed from.

    Args:
        device: where the matrices are; a part of its free memory is used.
    """

    def __init__(self, device: torch.device):
        self._left = torch.cuda.mem_get_info(device)[0] // _SHARE if device.type == "cuda" else _CPU_BYTES
        self._entries: dict[tuple[int, Hashable], tuple[object, object]] = {}

    def find(self, owner: object, key: Hashable, make: Callable[[], T]) -> T:
        """What ``make`` returns, at the first call for this object ``owner`` and ``key``, if there is room for it.

        The matrices must not be changed.
        """
        entry = self._entries.get((id(owner), key))
        if entry is not None:
            return entry[1]  # type: ignore[return-value]
        made = make()
        size = _count_bytes(made)
        if size <= self._left:
            self._left -= size
            self._entries[id(owner), key] = owner, made  # the owner stays, so that its id stays its own
        return made

    def clear(self) -> None:
        """Free the memory of all matrices."""
        self._entries.clear()
        self._left = 0


def recall(memo: MatrixMemo | None, owner: object, key: Hashable, make: Callable[[], T]) -> T:
    """:meth:`MatrixMemo.find`; computed anew without a memo or an owner."""
    return make() if memo is None or owner is None else memo.find(owner, key, make)


def _count_bytes(made: object) -> int:
    """Bytes of a tensor, or of the different tensors of a dataclass."""
    parts = {id(made): made} if isinstance(made, torch.Tensor) else {id(part): part for part in vars(made).values()}
    return sum(part.nbytes for part in parts.values() if isinstance(part, torch.Tensor))
