"""Memory of large tensors on the CPU that is used again.

Memory that the system gives to a process costs one page fault per 4 KiB, which can take longer than to read a file from the page
cache; so the memory of a tensor that is gone is kept for the next one.
"""

import threading
import weakref
from typing import Any

import torch

__all__ = ["RecycledMemory"]

Array = Any  # of NumPy

_LARGE = 1 << 22  # bytes from which on memory is kept; the system's allocator keeps that of smaller tensors
_MOST_KEPT = 1 << 29  # bytes
_FITTING = 1.25  # times the size that is needed


class RecycledMemory:
    """Memory for tensors on the CPU, in any thread. What is kept is freed with this object.

    Args:
        others: memory is kept only while at least so many other tensors are in use: with fewer, memory matters more than time.
    """

    def __init__(self, others: int = 0):
        self._others, self._used = others, 0
        self._kept: list[Array] = []
        self._lock = threading.RLock()  # memory can be given back at any point, also of this class

    def empty(self, size: int) -> torch.Tensor:
        """A tensor of any content, uint8 (size,); when it and all views of it are gone, its memory is used again."""
        if size < _LARGE:
            return torch.empty(size, dtype=torch.uint8)
        whole = self._take(size)
        if whole is None:
            whole = torch.empty(size, dtype=torch.uint8).numpy()
        with self._lock:
            self._used += 1
        part = whole[:size]  # which the memory of a tensor made of it refers to, whatever views there are
        weakref.finalize(part, _give_back, weakref.ref(self), whole).atexit = False
        return torch.from_numpy(part)

    def copy(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy of a contiguous tensor on the CPU."""
        return self.empty(tensor.nbytes).view(tensor.dtype).view(tensor.shape).copy_(tensor)

    def _take(self, size: int) -> Array | None:
        """Memory of about the size out of what is kept. Where there is none, the oldest is freed: sizes have changed."""
        with self._lock:
            for index, whole in enumerate(self._kept):
                if size <= whole.nbytes <= size * _FITTING:
                    del self._kept[index]
                    return whole
            del self._kept[:1]
            return None

    def give_back(self, whole: Array) -> None:
        """Keep memory that is not used any more, unless there is much already."""
        with self._lock:
            self._used -= 1
            kept = sum(each.nbytes for each in self._kept)
            if self._used >= self._others and kept + whole.nbytes <= _MOST_KEPT:
                self._kept.append(whole)


def _give_back(owner: "weakref.ref[RecycledMemory]", whole: Array) -> None:
    memory = owner()
    if memory is not None:
        memory.give_back(whole)
