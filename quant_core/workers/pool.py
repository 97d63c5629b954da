"""Pools of devices: tasks in this process one after the other, or in one worker process per device.

A pool of processes sends the largest of the waiting tasks to the device that is free first. Each process has one more task
than it works on, so that its next weight is transferred during the arithmetic. A process takes seconds to start and to do its
first task; until then, a thread of this process works on its GPU. A task whose device was lost, or has too little memory for it,
is repeated by another device; when the memory of none is large enough, the part that does not fit is computed on the CPU, as in
a run on one device.
"""

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from ..cancellation import CancelCheck
from ..errors import OutOfMemoryError, QuantizationError
from ..events import Listener
from ..sources.source import CPU
from .process import WorkerProcess, is_lost
from .task import DeviceFailure, Task, first_line

__all__ = ["InProcess", "TaskPool", "WorkerPool", "open_pool"]

log = logging.getLogger(__name__)

_AHEAD = 2  # tasks that a process has at a time: the one that it works on and the next
_MOST_LOSSES = 2  # of devices by one task, which then is the likely cause
_WAITING = 1  # further tasks per device, among which the largest is next
_REHEARSAL = -1  # number of a task whose result nobody needs


class TaskPool(Protocol):
    """Devices that do tasks.

    Attributes:
        devices: names of the devices, for the report.
        model: of the devices of other machines, which do the same arithmetic; None for devices of this machine.
        device: where tensors of a task should be: the device of the arithmetic, or the CPU if they are sent elsewhere.
        capacity: number of unfinished tasks that keep all devices busy; more only take memory.
    """

    devices: str
    model: str | None
    device: torch.device
    capacity: int

    def submit(self, task: Task, size: int) -> "Future[Any]":
        """Do a task; ``size``: that of its tensors in bytes. The largest of several waiting tasks is next."""
        ...

    def take_failures(self) -> list[DeviceFailure]:
        """Failures of devices since the last call."""
        ...


class InProcess:
    """A :class:`TaskPool` of one device, which does each task during :meth:`submit`."""

    capacity = 1
    model: str | None = None

    def __init__(self, device: torch.device, emit: Listener, check: CancelCheck):
        self.device, self.devices = device, str(device)
        self._emit, self._check = emit, check

    def submit(self, task: Task, size: int) -> "Future[Any]":
        future: Future[Any] = Future()
        try:
            future.set_result(task.run(self.device, self._emit, self._check, cpu_fallback=True))
        except Exception as error:
            future.set_exception(error)
        return future

    def take_failures(self) -> list[DeviceFailure]:
        return []


@dataclass(eq=False)
class _Submitted:
    """A task that was submitted.

    Attributes:
        number: in the order of submission.
        refused: workers whose memory is too small for it.
        losses: number of devices that were lost while they worked on it.
    """

    number: int
    task: Task
    size: int
    future: "Future[Any]" = field(default_factory=Future)
    refused: set["_Worker"] = field(default_factory=set)
    losses: int = 0


@dataclass(eq=False)
class _Worker:
    """A process and the tasks that it has, by number.

    Attributes:
        started: the process waits for tasks.
        ready: it is also as fast as it will be.
    """

    process: WorkerProcess
    tasks: dict[int, _Submitted] = field(default_factory=dict)
    started: bool = False
    ready: bool = False


class _Closed(Exception):
    """The pool was closed during a task in this process."""


class WorkerPool:
    """A :class:`TaskPool` of one process per device; a context manager, which ends the processes.

    Args:
        devices: one process for each.
        emit: listener of the events of tasks; called by threads.
        ahead: tasks that a process has at a time: 1 for long tasks, so that none waits for a busy device.
        threads: work on each device in a thread of this process until its process is ready.
    """

    device = CPU
    model: str | None = None

    def __init__(
        self,
        devices: Sequence[torch.device],
        emit: Listener,
        *,
        ahead: int = _AHEAD,
        threads: bool = False,
    ):
        self.devices = ", ".join(map(str, devices))
        self.capacity = (ahead + _WAITING) * len(devices)
        self._emit, self._ahead = emit, ahead
        self._changed = threading.Condition()  # guards everything below
        self._closed = False
        self._number = 0
        self._waiting: list[_Submitted] = []
        self._failures: list[DeviceFailure] = []
        self._end = ""  # why there are no workers any more
        self._rehearsed = threads
        self._rehearsal: _Submitted | None = None  # the smallest task
        self._workers: list[_Worker] = []
        try:
            for device in devices:
                self._workers.append(_Worker(WorkerProcess(device, slots=ahead)))
        except BaseException:
            self._kill()
            raise
        for worker in self._workers:
            for work in (self._feed, self._collect):
                self._start_thread(work, worker)
        inference = torch.is_inference_mode_enabled()
        here = self._workers if threads else ()
        self._threads = [self._start_thread(self._work_here, worker, inference) for worker in here]

    def _start_thread(self, work: Callable[..., None], *arguments: Any) -> threading.Thread:
        thread = threading.Thread(target=work, args=arguments, name="learned-rounding-worker", daemon=True)
        thread.start()
        return thread

    @property
    def pids(self) -> list[int]:
        """Ids of the running processes."""
        with self._changed:
            return [worker.process.pid for worker in self._workers]

    def submit(self, task: Task, size: int) -> "Future[Any]":
        with self._changed:
            submitted = _Submitted(self._number, task, size)
            self._number += 1
            if self._rehearsed and (self._rehearsal is None or size < self._rehearsal.size):
                self._rehearsal = submitted
            self._add(submitted)
        return submitted.future

    def take_failures(self) -> list[DeviceFailure]:
        with self._changed:
            failures, self._failures = self._failures, []
        return failures

    def _feed(self, worker: _Worker) -> None:
        """Send tasks to a worker."""
        if self._rehearsed:
            self._rehearse(worker)
        while True:
            with self._changed:
                while (chosen := self._choose(worker)) is None and not self._is_over(worker):
                    self._changed.wait()
                if chosen is None:
                    return
                self._waiting.remove(chosen)
                worker.tasks[chosen.number] = chosen
                last_resort = chosen.refused >= set(self._workers)
            try:
                worker.process.send(chosen.number, chosen.task, cpu_fallback=last_resort)
            except OSError:
                return  # the other thread finds out why
            except Exception as error:  # the task cannot be pickled, and a part of it is in the pipe
                with self._changed:
                    if worker.tasks.pop(chosen.number, None) is None:  # another one has it
                        return
                chosen.future.set_exception(error)
                worker.process.kill()
                return

    def _rehearse(self, worker: _Worker) -> None:
        """Let a new process do a task of another one: its first one takes seconds for libraries and kernels to load."""
        with self._changed:
            while not (worker.started and self._rehearsal) and not self._is_over(worker):
                self._changed.wait()
            if self._is_over(worker) or self._rehearsal is None:
                return
            task = self._rehearsal.task
        try:
            worker.process.send(_REHEARSAL, task, cpu_fallback=False)
        except OSError:
            return
        except Exception:  # it cannot be pickled, which its own process reports
            log.debug("rehearsal on %s", worker.process.device, exc_info=True)
            worker.process.kill()

    def _work_here(self, worker: _Worker, inference: bool) -> None:
        """Do tasks on the device of a worker until its process is ready; ``inference``: in PyTorch's inference mode."""
        device = worker.process.device
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            with torch.inference_mode(inference):
                while (chosen := self._choose_here(worker)) is not None and self._do_here(chosen, device):
                    pass
            if device.type == "cuda":
                with contextlib.suppress(RuntimeError):  # of a GPU that is lost
                    torch.cuda.empty_cache()  # the process needs the memory

    def _choose_here(self, worker: _Worker) -> _Submitted | None:
        """Wait for the largest waiting task; None when the process of the worker is ready, or nothing is left to do."""
        with self._changed:
            while not self._waiting and not worker.ready and not self._is_over(worker):
                self._changed.wait()
            if worker.ready or self._is_over(worker):
                return None
            chosen = self._largest(self._waiting)
            self._waiting.remove(chosen)
            return chosen

    def _do_here(self, submitted: _Submitted, device: torch.device) -> bool:
        """Do a task in this thread; False where the device cannot, and the task is left to the processes."""

        def check() -> None:
            if self._closed:
                raise _Closed

        try:
            result = submitted.task.run(device, self._emit, check, cpu_fallback=False)
        except Exception as error:
            if isinstance(error, (_Closed, OutOfMemoryError)) or is_lost(device, error):
                log.debug("%s in this process: %s", device, first_line(error))
                with self._changed:
                    self._add(submitted)
                return False
            submitted.future.set_exception(error)
        else:
            submitted.future.set_result(result)
        return True

    def _add(self, submitted: _Submitted) -> None:
        """Let a task wait for a worker."""
        if self._workers:
            self._waiting.append(submitted)
            self._changed.notify_all()
        else:
            self._give_up(submitted)

    def _choose(self, worker: _Worker) -> _Submitted | None:
        """The largest waiting task that the worker should do now."""
        if self._is_over(worker) or not worker.ready or len(worker.tasks) >= self._ahead:
            return None
        if len(worker.tasks) > min(len(each.tasks) for each in self._workers):
            return None  # another one has less to do, or will have
        everyone = set(self._workers)
        fitting = [each for each in self._waiting if worker not in each.refused or each.refused >= everyone]
        return self._largest(fitting) if fitting else None

    @staticmethod
    def _largest(waiting: Sequence[_Submitted]) -> _Submitted:
        return max(waiting, key=lambda each: (each.size, -each.number))

    def _is_over(self, worker: _Worker) -> bool:
        return self._closed or worker not in self._workers

    def _collect(self, worker: _Worker) -> None:
        """Receive the results of a worker until it ends."""
        try:
            reason = self._receive(worker)
        except (EOFError, OSError):
            reason = ""  # that of the process
        except Exception as error:  # of a message or of the listener; of a file that the pool has closed
            log.debug("receiving from %s", worker.process.device, exc_info=True)
            reason = first_line(error)
        self._lose(worker, reason)

    def _receive(self, worker: _Worker) -> str:
        """Receive results until the device is lost; returns why. Raises EOFError if the process ends."""
        while True:
            kind, content = worker.process.receive()
            if kind == "event":
                if worker.ready:
                    self._emit(content)
                continue
            if kind == "started":
                self._set_state(worker, ready=not self._rehearsed)
                continue
            number, result = content
            if number == _REHEARSAL and kind != "lost":
                self._set_state(worker, ready=True)
                continue
            if kind == "lost":
                return first_line(result)
            self._finish(worker, number, kind, result)

    def _set_state(self, worker: _Worker, *, ready: bool) -> None:
        with self._changed:
            worker.started, worker.ready = True, ready
            if all(each.ready for each in self._workers):
                self._rehearsed, self._rehearsal = False, None
            self._changed.notify_all()

    def _finish(self, worker: _Worker, number: int, kind: str, result: Any) -> None:
        with self._changed:
            submitted = worker.tasks.pop(number)
            self._changed.notify_all()
            if (
                kind == "failed"
                and isinstance(result, OutOfMemoryError)
                and not submitted.refused >= set(self._workers)
            ):
                submitted.refused.add(worker)
                self._waiting.append(submitted)
                if not submitted.refused >= set(self._workers):
                    name = str(worker.process.device)
                    self._failures.append(DeviceFailure(name, lost=False, reason=first_line(result), repeated=1))
                return
        if kind == "failed":
            submitted.future.set_exception(result)
        else:
            submitted.future.set_result(result)

    def _lose(self, worker: _Worker, reason: str) -> None:
        """Give the tasks of a worker that has ended to the others."""
        with self._changed:
            if self._closed:
                return
        reason = reason or worker.process.describe_end()
        worker.process.kill()
        with self._changed:
            if self._closed:
                return
            self._workers.remove(worker)
            self._end = reason
            current = next(iter(worker.tasks), None)  # in the order in which they were sent: the others wait behind it
            for number, submitted in worker.tasks.items():
                submitted.losses += number == current
            repeated = [each for each in worker.tasks.values() if each.losses < _MOST_LOSSES]
            for submitted in worker.tasks.values():
                if submitted.losses >= _MOST_LOSSES:
                    self._refuse(submitted)
            if self._workers:
                self._failures.append(DeviceFailure(str(worker.process.device), True, reason, len(repeated)))
                self._waiting += repeated
            else:
                for submitted in (*self._waiting, *repeated):
                    self._give_up(submitted)
                self._waiting.clear()
            self._changed.notify_all()

    def _refuse(self, submitted: _Submitted) -> None:
        submitted.future.set_exception(
            QuantizationError(
                f"{submitted.task.title}: {_MOST_LOSSES} devices were lost during this, the last one because {self._end}; "
                "use devices with more memory, or leave it out."
            )
        )

    def _give_up(self, submitted: _Submitted) -> None:
        submitted.future.set_exception(
            QuantizationError(
                f"All of {self.devices} were lost, the last one because {self._end}; run again, with fewer programs on these "
                "devices, or on others."
            )
        )

    def __enter__(self) -> "WorkerPool":
        return self

    def __exit__(self, *_) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._kill()
        for thread in self._threads:
            thread.join()

    def _kill(self) -> None:
        for worker in self._workers:
            worker.process.kill()


@contextlib.contextmanager
def open_pool(devices: Sequence[torch.device], emit: Listener, check: CancelCheck) -> Iterator[TaskPool]:
    """The pool of a run: processes for several devices, else this process."""
    if len(devices) == 1:
        yield InProcess(devices[0], emit, check)
        return
    threads = devices[0].type == "cuda"  # processes of a CPU start faster, and share its cores
    with WorkerPool(devices, emit, threads=threads) as pool:
        yield pool
