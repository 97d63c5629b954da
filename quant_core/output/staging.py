"""Bytes between files and a GPU through small page-locked buffers.

Fresh pageable memory costs a page fault every 4 KiB on the way in and on the way out, which is slower than the disk;
a few page-locked buffers that are used again and again are filled at the speed of the page cache and copied at that
of the bus.
"""

import zlib
from collections.abc import Callable, Iterator

import torch

__all__ = ["Staging", "byte_views", "tensor_checksum"]

_BUFFER = 1 << 24
_BUFFERS = 4


class Staging:
    """A ring of page-locked buffers for one direction, used by one thread at a time."""

    def __init__(self):
        self._ring: list[tuple[torch.Tensor, torch.cuda.Event]] = []
        self._next = 0

    def _buffer(self) -> tuple[torch.Tensor, torch.cuda.Event]:
        """The next buffer that no copy uses any more."""
        if len(self._ring) < _BUFFERS:
            self._ring.append((torch.empty(_BUFFER, dtype=torch.uint8, pin_memory=True), torch.cuda.Event()))
            return self._ring[-1]
        buffer, copied = self._ring[self._next]
        self._next = (self._next + 1) % _BUFFERS
        copied.synchronize()
        return buffer, copied

    def fill(self, target: torch.Tensor, read_into: Callable[[memoryview, int], None]) -> None:
        """Fill ``target`` (uint8, 1-D, on a GPU); ``read_into(view, offset)`` provides the bytes from ``offset`` on."""
        with torch.cuda.device(target.device):
            for start in range(0, target.numel(), _BUFFER):
                part = target[start : start + _BUFFER]
                buffer, copied = self._buffer()
                read_into(memoryview(buffer[: part.numel()].numpy()), start)
                part.copy_(buffer[: part.numel()], non_blocking=True)
                copied.record()

    def drain(self, source: torch.Tensor) -> Iterator[memoryview]:
        """The bytes of ``source`` (uint8, 1-D, on a GPU) piece by piece; each view is valid until the next is asked for."""
        with torch.cuda.device(source.device):
            for start in range(0, source.numel(), _BUFFER):
                part = source[start : start + _BUFFER]
                buffer, copied = self._buffer()
                buffer[: part.numel()].copy_(part, non_blocking=True)
                copied.record()
                copied.synchronize()
                yield memoryview(buffer[: part.numel()].numpy())


def byte_views(tensor: torch.Tensor, staging: Staging) -> Iterator[memoryview]:
    """The memory of any tensor as bytes; a tensor on a GPU comes through ``staging``."""
    flat = tensor.detach().contiguous().flatten().view(torch.uint8)
    if flat.is_cuda:
        yield from staging.drain(flat)
    else:
        yield memoryview(flat.cpu().numpy())


def tensor_checksum(tensor: torch.Tensor, staging: Staging) -> int:
    """The CRC-32 of the memory of any tensor."""
    crc = 0
    for view in byte_views(tensor, staging):
        crc = zlib.crc32(view, crc)
    return crc
