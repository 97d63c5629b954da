"""Threads of a run: one reads the next tensors and one writes the previous layers while the current layer is quantized."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import Protocol, TypeVar

import torch

from ..cancellation import CancelCheck, wait_for
from ..sources import Source
from .resume import LayerEvent, RunJournal

__all__ = ["LayerWriter", "TensorSink", "compute_ahead", "read_ahead"]

_QUEUE = 1 << 26  # bytes of several tensors read ahead, and of several layers not yet written; one may be larger
_LAYERS = 4  # not yet written: what a killed run loses

Result = TypeVar("Result")


class TensorSink(Protocol):
    """Destination of the tensors of a run."""

    def add(self, name: str, tensor: torch.Tensor) -> int:
        """Add one tensor; returns its size in bytes."""
        ...


def read_ahead(
    source: Source, reads: Iterable[tuple[str, torch.device]], check: CancelCheck, *, threads: int = 1
) -> Iterator[tuple[str, torch.Tensor]]:
    """Read tensors to their devices; the next ones, up to 64 MB or one per thread, are read while the caller works on the
    current one."""
    pool = ThreadPoolExecutor(threads, thread_name_prefix="learned-rounding-read")
    remaining = deque(reads)
    pending: deque[tuple[str, Future[torch.Tensor]]] = deque()
    queued = 0

    def submit_next() -> None:
        nonlocal queued
        while remaining:
            name, device = remaining[0]
            size = source.tensors[name].nbytes
            if len(pending) >= threads and queued + size > _QUEUE:
                return
            remaining.popleft()
            pending.append((name, pool.submit(source.read, name, device)))
            queued += size

    try:
        submit_next()
        while pending:
            name, future = pending.popleft()
            tensor = wait_for(future, check)
            del future
            queued -= source.tensors[name].nbytes
            submit_next()
            yield name, tensor
            del tensor
    finally:
        pool.shutdown(wait=False, cancel_futures=True)  # a read in progress ends when the source is closed


def compute_ahead(function: Callable[[str], Result], names: Iterable[str], check: CancelCheck) -> Iterator[Result]:
    """Yield ``function(name)`` for each name; the next one is computed by a thread while the caller works on the current one."""
    pool = ThreadPoolExecutor(1, thread_name_prefix="learned-rounding-ahead")
    remaining = iter(names)
    try:
        pending = [pool.submit(function, name) for name in islice(remaining, 1)]
        while pending:
            result = wait_for(pending.pop(), check)
            pending = [pool.submit(function, name) for name in islice(remaining, 1)]
            yield result
            del result
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


class LayerWriter:
    """Context that adds tensors to a sink on one thread, layer by layer; leaving it waits for the last layer."""

    def __init__(self, sink: TensorSink, journal: RunJournal | None, check: CancelCheck):
        self._sink, self._journal, self._check = sink, journal, check
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="learned-rounding-write")
        self._pending: deque[tuple[Future[None], int]] = deque()
        self._queued = 0  # bytes of the pending layers

    def add(
        self, tensors: Mapping[str, torch.Tensor], events: Sequence[LayerEvent], config: Mapping[str, object] | None
    ) -> None:
        """Write one layer once there is room for it; ``events`` and ``config`` are for the journal."""
        size = sum(tensor.nbytes for tensor in tensors.values())
        self.wait_for_room(size)
        previous = self._pending[-1][0] if self._pending else None

        def write() -> None:
            if previous is not None:
                previous.result()  # nothing is written after a layer that failed
            for name, tensor in tensors.items():
                self._sink.add(name, tensor)
            if self._journal is not None:
                self._journal.record_layer(events, config)

        self._pending.append((self._pool.submit(write), size))
        self._queued += size

    def wait_for_room(self, size: int) -> None:
        """Wait until a layer of ``size`` bytes is alone, or the fourth or an earlier one of up to 64 MB in all."""
        while self._pending and (
            self._pending[0][0].done() or len(self._pending) >= _LAYERS or self._queued + size > _QUEUE
        ):
            self._wait_for_first()

    def wait(self) -> None:
        """Wait until all layers are written."""
        while self._pending:
            self._wait_for_first()

    def abandon(self) -> None:
        """Write no further layers; leaving the context waits for none."""
        self._pending.clear()
        self._stop()

    def _stop(self) -> None:
        """Begin no further write; one that hangs ends on its own."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _wait_for_first(self) -> None:
        """Wait until the first layer of the queue is written. Raises the error with which that failed."""
        future, size = self._pending[0]
        wait_for(future, self._check)
        self._pending.popleft()
        self._queued -= size

    def __enter__(self) -> "LayerWriter":
        return self

    def __exit__(self, kind, *_) -> None:
        try:
            if kind is None:
                self.wait()
        finally:
            self._stop()
