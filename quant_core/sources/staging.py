"""Copies between files and a GPU through a ring of small page-locked buffers.

Fresh pageable memory costs one page fault per 4 KiB in each direction, which is slower than the disk. Page-locked buffers
that are reused are filled at the speed of the page cache and copied at the speed of the bus.
"""

import zlib
from collections.abc import Callable, Iterator

import torch

__all__ = ["Staging", "byte_views", "tensor_checksum"]

_BUFFER = 1 << 24
_BUFFERS = 4


class Staging:
    """Ring of page-locked buffers for one direction and one thread at a time."""

    def __init__(self):
        self._ring: list[tuple[torch.Tensor, torch.cuda.Event]] = []
        self._next = 0

    def _buffer(self) -> tuple[torch.Tensor, torch.cuda.Event]:
        """The next buffer, after its previous copy has ended."""
        if len(self._ring) < _BUFFERS:
            self._ring.append((torch.empty(_BUFFER, dtype=torch.uint8, pin_memory=True), torch.cuda.Event()))
            return self._ring[-1]
        buffer, copied = self._ring[self._next]
        self._next = (self._next + 1) % _BUFFERS
        copied.synchronize()
        return buffer, copied

    def fill(self, target: torch.Tensor, read_into: Callable[[memoryview, int], None]) -> None:
        """Fill ``target`` (uint8, 1-D, on a GPU); ``read_into(view, offset)`` writes the bytes from ``offset`` on into a view."""
        with torch.cuda.device(target.device):
            for start in range(0, target.numel(), _BUFFER):
                part = target[start : start + _BUFFER]
                buffer, copied = self._buffer()
                read_into(buffer[: part.numel()].numpy().data, start)
                part.copy_(buffer[: part.numel()], non_blocking=True)
                copied.record()

    def drain(self, source: torch.Tensor) -> Iterator[memoryview]:
        """Yield the bytes of ``source`` (uint8, 1-D, on a GPU) in parts; each view is valid until the next one is requested."""
        with torch.cuda.device(source.device):
            for start in range(0, source.numel(), _BUFFER):
                part = source[start : start + _BUFFER]
                buffer, copied = self._buffer()
                buffer[: part.numel()].copy_(part, non_blocking=True)
                copied.record()
                copied.synchronize()
                yield buffer[: part.numel()].numpy().data


def byte_views(tensor: torch.Tensor, staging: Staging) -> Iterator[memoryview]:
    """Yield the bytes of a tensor of any dtype and strides in row-major order; those on a GPU are copied through ``staging``."""
    flat = tensor.detach().contiguous().flatten().view(torch.uint8)
    if flat.is_cuda:
        yield from staging.drain(flat)
    else:
        yield flat.cpu().numpy().data


def tensor_checksum(tensor: torch.Tensor, staging: Staging) -> int:
    """CRC-32 of the bytes of a tensor."""
    crc = 0
    for view in byte_views(tensor, staging):
        crc = zlib.crc32(view, crc)
    return crc
