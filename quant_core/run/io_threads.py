"""Threads of a run: one reads the next tensor and one writes the previous layer while the current layer is quantized."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import torch

from ..cancellation import CancelCheck, wait_for
from ..sources import Source
from .resume import LayerEvent, RunJournal

__all__ = ["LayerWriter", "TensorSink", "read_ahead"]


class TensorSink(Protocol):
    """Destination of the tensors of a run."""

    def add(self, name: str, tensor: torch.Tensor) -> int:
        """Add one tensor; returns its size in bytes."""
        ...


def read_ahead(
    source: Source, reads: Iterable[tuple[str, torch.device]], check: CancelCheck
) -> Iterator[tuple[str, torch.Tensor]]:
    """Read tensors to their devices; the next one is read while the caller works on the current one."""
    pool = ThreadPoolExecutor(1, thread_name_prefix="learned-rounding-read")
    try:
        remaining = iter(reads)
        pending = _submit_next(pool, source, remaining)
        while pending is not None:
            name, future = pending
            tensor = wait_for(future, check)
            del future
            pending = _submit_next(pool, source, remaining)
            yield name, tensor
            del tensor
    finally:
        pool.shutdown(wait=False, cancel_futures=True)  # a read in progress ends when the source is closed


def _submit_next(
    pool: ThreadPoolExecutor, source: Source, remaining: Iterator[tuple[str, torch.device]]
) -> tuple[str, Future[torch.Tensor]] | None:
    read = next(remaining, None)
    return None if read is None else (read[0], pool.submit(source.read, *read))


class LayerWriter:
    """Context that adds tensors to a sink on one thread, layer by layer; leaving it waits for the last layer."""

    def __init__(self, sink: TensorSink, journal: RunJournal | None, check: CancelCheck):
        self._sink, self._journal, self._check = sink, journal, check
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="learned-rounding-write")
        self._pending: Future[None] | None = None

    def add(
        self,
        tensors: Mapping[str, torch.Tensor],
        events: Sequence[LayerEvent],
        config: Mapping[str, object] | None,
        source_tensors: Mapping[str, torch.Tensor],
    ) -> None:
        """Write one layer once the previous one is written; ``events``, ``config`` and ``source_tensors`` are for the journal."""

        def write() -> None:
            for name, tensor in tensors.items():
                self._sink.add(name, tensor)
            if self._journal is not None:
                self._journal.record_layer(events, config, source_tensors)

        self.wait()
        self._pending = self._pool.submit(write)

    def wait(self) -> None:
        """Wait until the previous layer is written."""
        if self._pending is not None:
            wait_for(self._pending, self._check)

    def __enter__(self) -> "LayerWriter":
        return self

    def __exit__(self, kind, *_) -> None:
        try:
            if kind is None:
                self.wait()
        finally:
            # After an error, a write that hangs ends on its own.
            self._pool.shutdown(wait=kind is None, cancel_futures=True)
