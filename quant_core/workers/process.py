"""One worker process: its start, its main function, and the connection to it.

A task and its result have a slot, of which the process has as many as tasks at a time: memory for the tensors of each direction.
"""

import contextlib
import json
import logging
import os
import queue
import signal
import subprocess
import sys
import threading
import traceback
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import is_dataclass
from pathlib import Path
from typing import IO, Any, NoReturn

import torch

from ... import kernels
from ..errors import OutOfMemoryError
from ..file_system import widen_pipe
from ..sources.recycled import RecycledMemory
from .devices import without_number
from .messages import RemoteTraceback, pack_error, read_message, write_message
from .shared_memory import SharedMemory

__all__ = ["WorkerProcess", "is_lost", "serve"]

log = logging.getLogger(__name__)

_ROOT = Path(__file__).resolve().parents[2]  # folder of the package, which may be a custom node of any name
_PACKAGE = __name__.removesuffix(".quant_core.workers.process")
_START = Path(__file__).with_name("start.py")
# Seconds after which the arithmetic lets the thread continue that receives: it asks for each part of a message.
_SWITCH_INTERVAL = 2e-4
_WAIT = 10  # s for a killed process to end, and for the exit code of one whose pipe is closed


class WorkerProcess:
    """A process that runs tasks one after the other on one device, and ends with this one.

    Args:
        device: device of its arithmetic.
        slots: number of tasks that it has at a time.

    Attributes:
        device: the same.
    """

    def __init__(self, device: torch.device, slots: int = 1):
        self.device = device
        self._free, self._taken = deque(range(slots)), dict[int, int]()  # slots; number of a task → its slot
        self._copies = RecycledMemory()
        shared = slots if SharedMemory.exists() else 0
        self._tasks, self._results = ([SharedMemory() for _ in range(shared)] for _ in range(2))
        tasks, results = ([memory.descriptor for memory in memories] for memories in (self._tasks, self._results))
        command = [sys.executable, str(_START), _PACKAGE, str(_ROOT), json.dumps(sys.path)]
        arguments = [str(device), kernels.backend(), json.dumps(torch_settings()), json.dumps([tasks, results])]
        try:
            self._process = subprocess.Popen(
                [*command, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, pass_fds=(*tasks, *results)
            )
        except BaseException:
            self._close_memory()
            raise
        assert self._process.stdin is not None and self._process.stdout is not None
        self._stdin, self._stdout = self._process.stdin, self._process.stdout
        for file in (self._stdin, self._stdout):
            widen_pipe(file.fileno())

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    def send(self, number: int, task: Any, *, cpu_fallback: bool) -> None:
        """Send a task. Raises OSError if the process has ended, IndexError if it has a task in each slot."""
        slot = self._taken[number] = self._free.popleft()
        memory = self._tasks[slot] if self._tasks else None
        try:
            write_message(self._stdin, (number, slot, task, cpu_fallback), slot, memory)
        except ValueError as error:
            if self._stdin.closed:
                raise BrokenPipeError from error
            raise

    def receive(self) -> tuple[str, Any]:
        """Wait for the next message: ("started", None) once, then ("done", (number, result)), ("event", event), or
        ("failed", (number, error)) or ("lost", (number, error)) after an error of a task or of the device.

        Raises:
            EOFError: the process has ended.
        """
        kind, content = read_message(self._stdout, self._results, self._copies)
        if kind in ("failed", "lost"):
            number, (error, trace) = content
            error.__cause__ = RemoteTraceback(trace)
            content = number, error
        if kind in ("failed", "lost", "done"):
            self._free.append(self._taken.pop(content[0]))
        return kind, content

    def describe_end(self) -> str:
        """Why the process has ended, as a phrase."""
        try:
            code = self._process.wait(_WAIT)
        except subprocess.TimeoutExpired:
            return "its process does not end"
        if code < 0:
            names = {each.value: each.name for each in signal.Signals}
            return f"its process was ended by {names.get(-code, f'signal {-code}')}"
        return f"its process ended with exit code {code}"

    def kill(self) -> None:
        """End the process without waiting for its task. One that the driver of a lost GPU does not let end is left alone."""
        self._process.kill()
        try:
            self._process.wait(_WAIT)
        except subprocess.TimeoutExpired:
            log.warning("The process %d of %s does not end.", self.pid, self.device)
            return
        for file in (self._stdin, self._stdout):
            with contextlib.suppress(OSError):  # of what was not yet written
                file.close()
        self._close_memory()

    def _close_memory(self) -> None:
        for memory in (*self._tasks, *self._results):
            memory.close()


def torch_settings() -> dict[str, Any]:
    """Settings of torch on which the results of sums depend."""
    return {
        "threads": torch.get_num_threads(),
        "float32": torch.get_float32_matmul_precision(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "bf16": torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction,
    }


def apply_torch_settings(settings: Mapping[str, Any]) -> None:
    """Apply the :func:`torch_settings` of another process."""
    torch.set_num_threads(settings["threads"])
    torch.set_float32_matmul_precision(settings["float32"])
    torch.use_deterministic_algorithms(settings["deterministic"])
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = settings["bf16"]


def serve(device: str, backend: str, settings: str, descriptors: str) -> NoReturn:
    """Main function of a worker process: run the tasks that arrive on standard input until it is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that started this one
    sys.setswitchinterval(_SWITCH_INTERVAL)
    apply_torch_settings(json.loads(settings))
    chosen = without_number(torch.device(device))
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    messages, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print
    with open(os.devnull, "rb") as nothing:  # compilers that a kernel starts do not inherit the pipe
        os.dup2(nothing.fileno(), 0)
    task_memory, result_memory = ([SharedMemory(each) for each in opened] for opened in json.loads(descriptors))
    tasks: queue.SimpleQueue[tuple[int, int, Any, bool]] = queue.SimpleQueue()
    torch.zeros(1, device=chosen).cpu()  # initializes CUDA
    threading.Thread(target=_read_tasks, args=(messages, task_memory, tasks, chosen), daemon=True).start()
    write_message(replies, ("started", None))
    with kernels.using(backend):
        while True:
            _run_task(chosen, replies, result_memory, *tasks.get())


def _read_tasks(
    messages: IO[bytes],
    memories: Sequence[SharedMemory],
    tasks: "queue.SimpleQueue[tuple[int, int, Any, bool]]",
    device: torch.device,
) -> NoReturn:
    """Queue the tasks that arrive during another one, loaded; end the process when the other process has ended."""
    code = 1
    try:
        stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        while True:
            number, slot, task, cpu_fallback = read_message(messages, memories)
            tasks.put((number, slot, _load_task(task, device, stream), cpu_fallback))
    except EOFError:
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def _load_task(task: Any, device: torch.device, stream: Any) -> Any:
    """The task with its large tensors on a GPU, copied beside the arithmetic of the current one."""
    if stream is None or not hasattr(task, "load"):
        return task
    try:
        with torch.cuda.stream(stream):
            loaded = task.load(device)
        stream.synchronize()
    except torch.OutOfMemoryError:  # the current task needs it
        return task
    for tensor in _find_tensors(loaded):
        if tensor.is_cuda:
            tensor.record_stream(torch.cuda.default_stream(device))  # which must be done with it before it is reused
    return loaded


def _find_tensors(value: Any) -> Iterator[torch.Tensor]:
    """The tensors of a dataclass, and of dataclasses in its fields."""
    if isinstance(value, torch.Tensor):
        yield value
    elif is_dataclass(value):
        for part in vars(value).values():
            yield from _find_tensors(part)


def _run_task(
    device: torch.device,
    replies: IO[bytes],
    memories: Sequence[SharedMemory],
    number: int,
    slot: int,
    task: Any,
    cpu_fallback: bool,
) -> None:
    """Run one task and send its result; end the process if the device is lost."""

    def emit(event: Any) -> None:
        write_message(replies, ("event", event))

    lost = False
    try:
        reply = "done", (number, task.run(device, emit, lambda: None, cpu_fallback=cpu_fallback))
    except Exception as error:
        lost = is_lost(device, error)
        reply = "lost" if lost else "failed", (number, pack_error(error))
    write_message(replies, reply, slot, memories[slot] if memories else None)
    if lost:
        os._exit(1)


def is_lost(device: torch.device, error: Exception) -> bool:
    """Whether the device works no longer: after an error of CUDA other than for memory, every further call fails."""
    if device.type != "cuda" or isinstance(error, (torch.OutOfMemoryError, OutOfMemoryError)):
        return False
    try:
        torch.cuda.empty_cache()
        torch.zeros(1, device=device).cpu()
    except (RuntimeError, AssertionError) as after:
        return not isinstance(after, torch.OutOfMemoryError)
    return False
