"""Copies between host memory or files and a GPU through small page-locked buffers.

Fresh pageable memory costs one page fault per 4 KiB in each direction, which is slower than the disk. Page-locked buffers
that are reused are filled at the speed of the page cache and copied at the speed of the bus. Several threads fill them,
because one copies from the page cache more slowly than the bus. Copies run on the current stream of the caller.
"""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import torch

__all__ = ["Staging", "byte_views"]

_BUFFER = 1 << 23
_BUFFERS = 8
_THREADS = 4  # that fill buffers


class Staging:
    """Rings of page-locked buffers, one for each GPU, for one direction and one caller at a time."""

    def __init__(self):
        self._rings: dict[torch.device, deque[tuple[torch.Tensor, torch.cuda.Event]]] = {}

    @staticmethod
    def _take(ring: "deque[tuple[torch.Tensor, torch.cuda.Event]]") -> tuple[torch.Tensor, torch.cuda.Event]:
        """The buffer that was given back first, after its copy has ended; a new one if all are in use."""
        try:
            buffer, copied = ring.popleft()
        except IndexError:
            return torch.empty(_BUFFER, dtype=torch.uint8, pin_memory=True), torch.cuda.Event()
        copied.synchronize()
        return buffer, copied

    def fill(self, target: torch.Tensor, read_into: Callable[[memoryview, int], None]) -> None:
        """Fill ``target`` (uint8, 1-D, on a GPU); ``read_into(view, offset)`` writes the bytes from ``offset`` on into a view.

        Threads call ``read_into`` at the same time for parts of a large target.
        """
        stream, ring = torch.cuda.current_stream(target.device), self._rings.setdefault(target.device, deque())

        # Inference mode, as a thread cannot otherwise write to a tensor that its caller made in this mode.
        @torch.inference_mode()
        def fill_part(start: int) -> None:
            part = target[start : start + _BUFFER]
            with torch.cuda.stream(stream):
                buffer, copied = self._take(ring)
                view = buffer[: part.numel()]
                read_into(view.numpy().data, start)
                part.copy_(view, non_blocking=True)
                copied.record(stream)
            ring.append((buffer, copied))

        starts = range(0, target.numel(), _BUFFER)
        with ExitStack() as stack:
            if len(starts) > 1:
                pool = ThreadPoolExecutor(min(_THREADS, len(starts)), thread_name_prefix="learned-rounding-fill")
                stack.callback(pool.shutdown, cancel_futures=True)
                deque(pool.map(fill_part, starts), maxlen=0)
            elif starts:
                fill_part(0)

    def drain(self, source: torch.Tensor) -> Iterator[memoryview]:
        """Yield the bytes of ``source`` (uint8, 1-D, on a GPU) in parts; each view is valid until the next one is requested.

        The next parts are copied meanwhile.
        """
        starts, copying = iter(range(0, source.numel(), _BUFFER)), deque()
        stream, ring = torch.cuda.current_stream(source.device), self._rings.setdefault(source.device, deque())
        while True:
            while len(copying) < _BUFFERS and (start := next(starts, None)) is not None:
                part = source[start : start + _BUFFER]
                with torch.cuda.stream(stream):
                    buffer, copied = self._take(ring)
                    buffer[: part.numel()].copy_(part, non_blocking=True)
                    copied.record(stream)
                copying.append((buffer, copied, part.numel()))
            if not copying:
                return
            buffer, copied, size = copying.popleft()
            copied.synchronize()
            yield buffer[:size].numpy().data
            ring.append((buffer, copied))


def byte_views(tensor: torch.Tensor, staging: Staging) -> Iterator[memoryview]:
    """Yield the bytes of a tensor of any dtype and strides in row-major order; those on a GPU are copied through ``staging``."""
    flat = tensor.detach().contiguous().flatten().view(torch.uint8)
    if flat.is_cuda:
        yield from staging.drain(flat)
    else:
        yield flat.cpu().numpy().data
