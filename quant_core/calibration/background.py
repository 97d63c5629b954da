"""Grams in host memory are updated on the GPU while the model runs: by threads and streams of their own."""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import torch

__all__ = ["Background", "Transfer"]

_JOBS = 2  # of which one waits
_PIECES = 2  # on their way back


class Background:
    """Does jobs on a GPU one after the other while the caller goes on; one may wait, and holds its rows meanwhile."""

    def __init__(self, device: torch.device):
        self._stream = torch.cuda.Stream(device)
        self._thread = ThreadPoolExecutor(1)
        self._jobs: deque[Future] = deque()

    def do(self, job: Callable[[torch.Tensor], None], rows: torch.Tensor) -> None:
        """``job(rows)`` as soon as the current stream has made ``rows``.

        Raises what an earlier job raised.
        """
        while len(self._jobs) >= _JOBS:
            self._jobs.popleft().result()
        made = torch.cuda.Event()
        made.record(torch.cuda.current_stream(rows.device))
        self._jobs.append(self._thread.submit(self._run, job, rows, made))

    @torch.inference_mode()
    def _run(self, job: Callable[[torch.Tensor], None], rows: torch.Tensor, made: torch.cuda.Event) -> None:
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(made)
            job(rows)
        self._stream.synchronize()  # then another stream may have the memory of the rows

    def finish(self) -> None:
        """Wait for all jobs. Raises what one of them raised."""
        while self._jobs:
            self._jobs.popleft().result()

    def close(self) -> None:
        """Wait for the job that runs, and drop the others."""
        self._thread.shutdown(cancel_futures=True)


class Transfer:
    """Pieces of a tensor to ``device`` and back; a GPU computes while the next piece is copied.

    Page-locked memory comes from torch, which keeps it and gives it out again.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._back: deque[tuple[torch.cuda.Event, torch.Tensor, torch.Tensor]] = deque()

    def _far(self, piece: torch.Tensor) -> bool:
        return self._device.type == "cuda" and not piece.is_cuda

    def fetch(self, piece: torch.Tensor) -> torch.Tensor:
        """``piece`` on the device."""
        return (piece.pin_memory() if self._far(piece) else piece).to(self._device, non_blocking=True)

    def store(self, made: torch.Tensor, piece: torch.Tensor) -> None:
        """Put ``made`` into ``piece``, at the latest in :meth:`finish`."""
        if not self._far(piece):
            piece.copy_(made)
            return
        landing = torch.empty(made.shape, dtype=made.dtype, pin_memory=True).copy_(made, non_blocking=True)
        arrived = torch.cuda.Event(blocking=True)
        arrived.record()
        self._back.append((arrived, landing, piece))
        if len(self._back) > _PIECES:
            self._land()

    def finish(self) -> None:
        """Wait for all pieces."""
        while self._back:
            self._land()

    def _land(self) -> None:
        arrived, landing, piece = self._back.popleft()
        arrived.synchronize()
        piece.copy_(landing)
