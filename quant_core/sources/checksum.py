"""64-bit checksum of tensors, computed on their device.

A multilinear hash modulo 2^64 (Carter and Wegman, 1979): each signed word x of 8 bytes becomes x + ⌊x/2^32⌋, so that its
highest bits count like the others, is multiplied by an odd constant and added up. Unlike a CRC this is a few elementwise
operators, so the bytes of a tensor on a GPU need not be copied for it, and the checksum of a file is the sum of those of
its parts.
"""

import functools
import io
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import NamedTuple

import torch

from .positional import positional_reader
from .source import CPU

__all__ = ["BLOCK", "FileChecksums", "byte_checksum", "tensor_checksum"]

_WORD = 8
_WORDS = 1 << 14  # of a block; torch does not spread an operator of that size over threads
BLOCK = _WORD * _WORDS  # bytes
_BLOCKS = {"cpu": 1}  # blocks of one launch: one stays in a CPU's cache
_BLOCKS_ACCELERATOR = 128
_CHUNK = {"cpu": 32 * BLOCK}  # bytes of a file for one thread
_CHUNK_ACCELERATOR = _BLOCKS_ACCELERATOR * BLOCK  # for one launch, as threads wait for each other to launch
_THREADS = min(8, os.cpu_count() or 1)  # that read and compute the checksums of chunks
_AHEAD = 2 * _THREADS  # chunks that are read before their result is needed
_MODULUS = 1 << 64
_MIX = (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9)  # of splitmix64


def _constants(start: int, count: int, device: torch.device) -> torch.Tensor:
    """Odd pseudo-random int64 constants number ``start`` to ``start`` + ``count``."""
    first, second = (constant - _MODULUS if constant >= _MODULUS >> 1 else constant for constant in _MIX)
    mixed = torch.arange(start + 1, start + 1 + count, device=device) * first
    return ((mixed ^ (mixed >> 30)) * second) | 1


@functools.cache
def _word_constants(device: torch.device) -> torch.Tensor:
    """The constants of the words of a block. The copy to a GPU is finished, so that every stream can use them."""
    return _constants(0, _WORDS, CPU).to(device)


def byte_checksum(data: torch.Tensor, offset: int = 0) -> int:
    """Checksum, from 0 to 2^64 − 1, of the uint8 tensor ``data`` (n,) at byte ``offset``, a multiple of :data:`BLOCK`.

    The checksum of concatenated parts is the sum of theirs modulo 2^64. Zeros at the end do not change it.
    """
    whole = data.numel() // BLOCK * BLOCK
    parts = [data[:whole]]
    if whole < data.numel() or not whole:
        parts.append(torch.nn.functional.pad(data[whole:], (0, BLOCK - data.numel() + whole)))
    weights, step = _word_constants(data.device), _BLOCKS.get(data.device.type, _BLOCKS_ACCELERATOR)
    groups = [words for part in parts for words in part.view(torch.int64).view(-1, _WORDS).split(step)]
    blocks = torch.empty(sum(map(len, groups)), dtype=torch.int64, device=data.device)
    mixed = torch.empty(max(map(len, groups)), _WORDS, dtype=torch.int64, device=data.device)
    sums = blocks.split(list(map(len, groups)))
    for words, out in zip(groups, sums, strict=True):  # without new tensors, which would fragment the heap
        buffer = torch.bitwise_right_shift(words, 32, out=mixed[: len(words)])
        torch.sum(buffer.add_(words).mul_(weights), 1, out=out)
    # Other constants than those of words: with the same ones, word i of block j and word j of block i would have equal weights.
    weights = _constants(_WORDS + offset // BLOCK, blocks.numel(), data.device)
    return int((blocks * weights).sum()) % _MODULUS


def tensor_checksum(tensor: torch.Tensor) -> int:
    """Checksum of the bytes of a tensor of any dtype and strides, in row-major order."""
    flat = tensor.detach().contiguous().flatten().view(torch.uint8)
    if flat.storage_offset() % _WORD:
        flat = flat.clone()
    return byte_checksum(flat)


class FileChecksums:
    """Checksums of consecutive parts of an open file, from its current position on. A context manager.

    Threads read chunks at their place in the file and compute their checksums; memory: one chunk for each thread, of 4 MB on
    a CPU and 16 MB on a GPU. The threads launch operators one after the other, so a GPU, which needs few, is several times as fast.

    Args:
        check: called for each chunk; raises to cancel.
        device: where checksums are computed.
    """

    def __init__(self, check: Callable[[], None], device: torch.device = CPU):
        self._check, self._device = check, device
        self._chunk = _CHUNK.get(device.type, _CHUNK_ACCELERATOR)
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="learned-rounding-checksum")
        self._buffers = threading.local()

    def next(self, file: io.FileIO | io.BytesIO, size: int) -> int | None:
        """:func:`byte_checksum` of the next ``size`` bytes, to whose end the position moves; None if the file is shorter."""
        end = file.tell() + size
        checksum = next(self.compute(file, [size]))
        file.seek(end)
        return checksum

    def compute(self, file: io.FileIO | io.BytesIO, sizes: Iterable[int]) -> Iterator[int | None]:
        """Yield the checksum of each of consecutive parts with these sizes; None, as the last one, if the file is shorter.

        The position of the file is undefined from here on: threads move it where the system has no positional reads.
        """
        read_at = positional_reader(file)
        chunks = _split_parts(file.tell(), sizes, self._chunk)
        pending: deque[tuple[Future[int | None], _Chunk]] = deque()
        total = 0
        while True:
            for chunk in islice(chunks, _AHEAD - len(pending)):
                self._check()
                pending.append((self._pool.submit(self._chunk_checksum, read_at, chunk), chunk))
            if not pending:
                return
            future, chunk = pending.popleft()
            checksum = future.result()
            if checksum is None:
                yield None
                return
            total = (total + checksum) % _MODULUS
            if chunk.is_last:
                yield total
                total = 0

    def _chunk_checksum(self, read_at: Callable[[memoryview, int], int], chunk: "_Chunk") -> int | None:
        buffer = getattr(self._buffers, "chunk", None)
        if buffer is None:
            pinned = self._device.type == "cuda"
            buffer = self._buffers.chunk = torch.empty(self._chunk, dtype=torch.uint8, pin_memory=pinned)
        part = buffer[: chunk.size]
        filled = _fill(part.numpy().data, read_at, chunk.position)
        return byte_checksum(part.to(self._device, non_blocking=True), chunk.offset) if filled else None

    def __enter__(self) -> "FileChecksums":
        return self

    def __exit__(self, *exc) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)


class _Chunk(NamedTuple):
    """Bytes of a part: place in the file, place in the part, number, and whether the part ends with them."""

    position: int
    offset: int
    size: int
    is_last: bool


def _split_parts(position: int, sizes: Iterable[int], chunk: int) -> Iterator[_Chunk]:
    for size in sizes:
        for offset in range(0, max(size, 1), chunk):
            length = min(size - offset, chunk)
            yield _Chunk(position + offset, offset, length, offset + length == size)
        position += size


def _fill(view: memoryview, read_at: Callable[[memoryview, int], int], position: int) -> bool:
    """Read until ``view`` is full; False if the file ends before."""
    done = 0
    while done < len(view):
        count = read_at(view[done:], position + done)
        if not count:
            return False
        done += count
    return True
