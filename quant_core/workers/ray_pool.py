"""Pool of the nodes of a Ray cluster: each task is a task of Ray, which schedules it and repeats it after a lost worker.

The tensors of a task and of its result travel through Ray's object store. A task whose GPU has too little memory is repeated
once with the part that does not fit on the CPU, as in a run on one device.
"""

import contextlib
import threading
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from ... import kernels
from ..errors import ClusterLostError, OutOfMemoryError, QuantizationError
from ..events import Listener
from ..sources.source import CPU
from .messages import RemoteTraceback, pack, unpack
from .process import torch_settings
from .ray_cluster import RayCluster, describe_missing
from .ray_tasks import run_task
from .task import DeviceFailure, Task, first_line

__all__ = ["RayPool"]

_AHEAD = 2  # tasks per worker: the one that it works on, and the next, whose tensors Ray transfers meanwhile
_RETRIES = 3  # times that Ray repeats a task whose worker or node was lost
_POLL = 0.2  # s between two looks at results and events
_CANCELLED = 10  # s for tasks that are cancelled to end


@dataclass(eq=False)
class _Submitted:
    """A task that was submitted.

    Attributes:
        packed: reference to the packed task in the object store.
        worker: name of the process that has begun it last; empty before.
        cpu_fallback: it may use the CPU.
    """

    title: str
    packed: Any
    worker: str = ""
    cpu_fallback: bool = False
    future: "Future[Any]" = field(default_factory=Future)


class RayPool:
    """A :class:`~.pool.TaskPool` on a Ray cluster; a context manager, which cancels unfinished tasks.

    Args:
        cluster: connection to the cluster.
        emit: listener of the events of tasks; called by a thread.

    Attributes:
        label: what the tasks belong to, as part of their names in Ray's dashboard; empty for nothing.
    """

    device = CPU

    def __init__(self, cluster: RayCluster, emit: Listener):
        self.devices, self.capacity = cluster.devices, _AHEAD * cluster.workers
        self.model: str | None = next(node.model for node in cluster.nodes) or "GPU" if cluster.cuda else CPU.type
        self._cluster, self._emit, self.label = cluster, emit, ""
        self._ray = cluster.ray
        self._run = self._ray.remote(**cluster.options, max_retries=_RETRIES)(run_task)
        self._setting = kernels.backend(), torch_settings()
        self._changed = threading.Condition()  # guards everything below
        self._closed = False
        self._number = 0
        self._submitted: dict[int, _Submitted] = {}
        self._references: dict[Any, int] = {}  # of results → number of the task
        self._failures: list[DeviceFailure] = []
        # beside this process, so that it is lost only with the cluster
        here = self._ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(cluster.node_id, soft=True)
        self._events = self._ray.util.queue.Queue(actor_options={"num_cpus": 0, "scheduling_strategy": here})
        self._thread = threading.Thread(target=self._collect, name="learned-rounding-ray", daemon=True)
        self._thread.start()

    def submit(self, task: Task, size: int) -> "Future[Any]":
        """See :class:`~.pool.TaskPool`; the order of tasks is Ray's."""
        self._cluster.check_lost()
        title = f"{task.title} of {self.label}" if self.label else task.title
        submitted = _Submitted(title, self._ray.put(pack(task)))
        with self._changed:
            number = self._number
            self._number += 1
            self._start(number, submitted)
            self._changed.notify_all()
        return submitted.future

    def take_failures(self) -> list[DeviceFailure]:
        with self._changed:
            failures, self._failures = self._failures, []
        return failures

    def cancel(self) -> None:
        """End all unfinished tasks; their futures are never done."""
        with self._changed:
            references = list(self._references)
            self._references.clear()
            self._submitted.clear()
        if self._cluster.lost or not references:
            return
        with contextlib.suppress(Exception):  # of a cluster that is being lost
            for reference in references:
                self._ray.cancel(reference, force=True)
            self._ray.wait(references, num_returns=len(references), timeout=_CANCELLED, fetch_local=False)

    @property
    def running(self) -> list[str]:
        """Names of the processes that have begun a task."""
        with self._changed:
            return [submitted.worker for submitted in self._submitted.values() if submitted.worker]

    def _start(self, number: int, submitted: _Submitted) -> None:
        reference = self._run.options(name=submitted.title).remote(
            submitted.packed, number, self._events, self._cluster.cuda, self._setting, submitted.cpu_fallback
        )
        self._submitted[number] = submitted
        self._references[reference] = number

    def _collect(self) -> None:
        """Receive results and events until the pool is closed or the cluster is lost."""
        while True:
            with self._changed:
                while not self._references and not self._closed:
                    self._changed.wait()
                if self._closed:
                    return
                references = list(self._references)
            try:
                done, _ = self._ray.wait(references, timeout=_POLL)
                self._receive_events()
                for reference in done:
                    self._receive(reference)
            except Exception as error:  # the connection has failed: errors of tasks are results
                if not self._closed:
                    self._cluster.report_lost(error)
            if self._cluster.lost:
                self._give_up()
                return

    def _receive(self, reference: Any) -> None:
        with self._changed:
            if reference not in self._references:  # cancelled
                return
            submitted = self._submitted[self._references[reference]]
        try:
            kind, result = unpack(self._ray.get(reference))
        except (self._ray.exceptions.LocalRayletDiedError, ConnectionError):
            raise
        except Exception as error:
            kind, result = "failed", (_describe(submitted, error), "")
        with self._changed:
            number = self._references.pop(reference, None)
            if number is None:
                return
            del self._submitted[number]
            if kind == "failed":
                error, trace = result
                if isinstance(error, OutOfMemoryError) and not submitted.cpu_fallback:
                    submitted.cpu_fallback = True
                    self._start(number, submitted)
                    return
                error.__cause__ = RemoteTraceback(trace) if trace else None
                submitted.future.set_exception(error)
            else:
                submitted.future.set_result(result)

    def _receive_events(self) -> None:
        """Pass on the events of tasks; a second process that begins a task shows that the first one was lost."""
        try:
            waiting = self._events.qsize()
            received = self._events.get_nowait_batch(waiting) if waiting else ()
        except Exception:  # without events tasks still do their work; whether the cluster answers is seen elsewhere
            return
        for number, packed in received:
            event = unpack(packed)
            if not isinstance(event, str):
                self._emit(event)
                continue
            with self._changed:
                submitted = self._submitted.get(number)
                if submitted is None:
                    continue
                if submitted.worker and submitted.worker != event:
                    self._failures.append(DeviceFailure(submitted.worker, True, "its process or node ended", 1))
                submitted.worker = event

    def _give_up(self) -> None:
        with self._changed:
            waiting = list(self._submitted.values())
            self._submitted.clear()
            self._references.clear()
        for submitted in waiting:
            submitted.future.set_exception(ClusterLostError(self._cluster.lost))

    def __enter__(self) -> "RayPool":
        return self

    def __exit__(self, *_) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self.cancel()
        if not self._cluster.lost:
            with contextlib.suppress(Exception):  # of a cluster that is being lost
                self._events.shutdown(force=True)


def _describe(submitted: _Submitted, error: Exception) -> QuantizationError:
    """The error of a task that Ray could not run."""
    if "No module named" in str(error):
        return QuantizationError(describe_missing(submitted.worker or "of the Ray cluster", error))
    return QuantizationError(
        f"{submitted.title} was lost on the Ray cluster {_RETRIES + 1} times, last with {type(error).__name__} "
        f"({first_line(error)}); see Ray's logs, and run the same command again."
    )
