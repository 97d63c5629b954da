"""Memory that a process and its worker process share, for the tensors of messages.

A pipe copies each byte twice, through buffers of the system, and the process that reads places it in fresh memory, of which each
page is a fault; that takes longer than the arithmetic of a GPU. Shared memory is written once and is used again.
"""

import mmap
import os

import torch

__all__ = ["SharedMemory"]

_GROWTH = 1.25  # of what is asked for, so that slightly larger tensors do not ask again


class SharedMemory:
    """Anonymous shared memory, which grows to the largest message; freed when no process has it.

    Args:
        descriptor: that of another process, which was passed to this one; None makes new memory.

    Attributes:
        descriptor: of the memory, open in this process.
    """

    def __init__(self, descriptor: int | None = None):
        self.descriptor = os.memfd_create("learned_rounding") if descriptor is None else descriptor
        self._bytes = torch.empty(0, dtype=torch.uint8)

    @staticmethod
    def exists() -> bool:
        """Whether the system has such memory: Linux has."""
        return hasattr(os, "memfd_create")

    def reserve(self, size: int) -> None:
        """Make room for ``size`` bytes in both processes, each of which calls this; views stay valid."""
        if size <= len(self._bytes):
            return
        if size > os.fstat(self.descriptor).st_size:
            os.ftruncate(self.descriptor, -(-int(size * _GROWTH) // mmap.PAGESIZE) * mmap.PAGESIZE)
        mapping = mmap.mmap(self.descriptor, os.fstat(self.descriptor).st_size)
        self._bytes = torch.frombuffer(mapping, dtype=torch.uint8)

    def tensor(self, begin: int, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
        """A tensor from byte ``begin`` on, a view of the memory."""
        count = torch.Size(shape).numel() * dtype.itemsize
        return self._bytes[begin : begin + count].view(dtype).reshape(shape)

    def close(self) -> None:
        """Close the memory in this process, also for the second time; views stay valid."""
        descriptor, self.descriptor = self.descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)
