"""Asynchronous GPU updates of Hessians in host memory, on threads and CUDA streams of their own."""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import torch

__all__ = ["BackgroundWorker", "Transfer"]

_MAX_JOBS = 2  # one running, one queued
_MAX_STORES = 2  # device-to-host copies in flight


class BackgroundWorker:
    """Run jobs on a GPU one after another, asynchronously. A queued job keeps its activations in device memory."""

    def __init__(self, device: torch.device):
        self._stream = torch.cuda.Stream(device)
        self._thread = ThreadPoolExecutor(1)
        self._jobs: deque[Future] = deque()

    def submit(self, job: Callable[[torch.Tensor], None], activations: torch.Tensor) -> None:
        """Run ``job(activations)`` once the current stream has computed ``activations``; blocks while the queue is full.

        Raises the exception of an earlier job.
        """
        while len(self._jobs) >= _MAX_JOBS:
            self._jobs.popleft().result()
        ready = torch.cuda.Event()
        ready.record(torch.cuda.current_stream(activations.device))
        self._jobs.append(self._thread.submit(self._run, job, activations, ready))

    @torch.inference_mode()
    def _run(self, job: Callable[[torch.Tensor], None], activations: torch.Tensor, ready: torch.cuda.Event) -> None:
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(ready)
            job(activations)
        self._stream.synchronize()  # before the allocator reuses the memory of the activations on another stream

    def wait(self) -> None:
        """Wait for all jobs. Raises the exception of the first job that failed."""
        while self._jobs:
            self._jobs.popleft().result()

    def close(self) -> None:
        """Wait for the running job and drop the queued ones."""
        self._thread.shutdown(cancel_futures=True)


class Transfer:
    """Copy blocks of a tensor to ``device`` and back; copies overlap with computation on a GPU.

    Pinned memory comes from torch's caching host allocator.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._stores: deque[tuple[torch.cuda.Event, torch.Tensor, torch.Tensor]] = deque()

    def _is_remote(self, block: torch.Tensor) -> bool:
        return self._device.type == "cuda" and not block.is_cuda

    def fetch(self, block: torch.Tensor) -> torch.Tensor:
        """Return ``block`` on the device."""
        return (block.pin_memory() if self._is_remote(block) else block).to(self._device, non_blocking=True)

    def store(self, values: torch.Tensor, block: torch.Tensor) -> None:
        """Copy ``values`` into ``block``; complete after :meth:`wait`."""
        if not self._is_remote(block):
            block.copy_(values)
            return
        staging = torch.empty(values.shape, dtype=values.dtype, pin_memory=True).copy_(values, non_blocking=True)
        copied = torch.cuda.Event(blocking=True)
        copied.record()
        self._stores.append((copied, staging, block))
        if len(self._stores) > _MAX_STORES:
            self._complete_store()

    def wait(self) -> None:
        """Wait for all copies."""
        while self._stores:
            self._complete_store()

    def _complete_store(self) -> None:
        copied, staging, block = self._stores.popleft()
        copied.synchronize()
        block.copy_(staging)
