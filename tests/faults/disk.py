"""A disk that fails at a chosen operation, and a process that runs on it.

Every write, cut, flush, naming and removal of the writer counts as one operation, and reads where they are asked for; every look at the
cancellation check counts too where a process is to be killed there.
"""

import errno
import json
import multiprocessing
import os
import signal
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
from safetensors.torch import load_file

from learned_rounding.quant_core import Recipe, quantize_file
from learned_rounding.quant_core.output import partial
from learned_rounding.quant_core.run import resume
from learned_rounding.quant_core.sources import Source, TensorSource

__all__ = ["Disk", "File", "failing", "flushed", "in_memory", "killed", "killing", "once", "processes", "run"]

_REAL_OPEN = open


class Disk:
    """Calls ``fault(file, data)`` before operation number ``at`` and all after it; ``file`` and ``data`` are those of a write."""

    def __init__(self, at: int | None = None, fault: Callable | None = None, reads: bool = False):
        self.operations, self._at, self.fault, self._reads = [], at, fault, reads

    def step(self, operation: str, file=None, data: bytes | memoryview = b"") -> None:
        if operation.startswith("read") and not self._reads:
            return
        self.operations.append(operation)
        if self._at is not None and len(self.operations) > self._at:
            self.fault(file, data)

    def open(self, path, mode="r", **options):
        name = "journal" if str(path).endswith(".journal") else "file"
        return File(_REAL_OPEN(path, mode, **options), self.step, name)

    def call(self, function: Callable, name: str) -> Callable:
        def counted(*args, **options):
            self.step(name)
            return function(*args, **options)

        return counted

    @contextmanager
    def under(self, *modules):
        """Files that these modules open lie on it; the writer's removals, namings and flushes count."""
        with pytest.MonkeyPatch.context() as patch:
            for module in modules or (partial, resume):
                patch.setattr(module, "open", self.open, raising=False)
            if not modules:
                for name in ("fsync", "replace", "link", "unlink"):
                    patch.setattr(os, name, self.call(getattr(os, name), name))
            yield self


class File:
    """A file that reports its operations before they are done. It is not a FileIO, so that no read at a position bypasses it."""

    def __init__(self, file, step: Callable, name: str):
        self._file, self._step, self._name = file, step, name

    def write(self, data) -> int:
        self._step(f"write {self._name}", self._file, data)
        return self._file.write(data)

    def truncate(self, size: int) -> int:
        self._step(f"cut {self._name}")
        return self._file.truncate(size)

    def read(self, *size) -> bytes:
        self._step(f"read {self._name}")
        return self._file.read(*size)

    def readinto(self, view) -> int:
        self._step(f"read {self._name}")
        return self._file.readinto(view)

    def __getattr__(self, name):
        return getattr(self._file, name)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._file.close()


def failing(code: int) -> Callable:
    """A fault that is an error of the system."""

    def fail(*_):
        raise OSError(code, os.strerror(code))

    assert code in errno.errorcode
    return fail


def once(fault: Callable) -> Callable:
    """The fault, the first time only."""
    faults = iter([fault])
    return lambda file, data: next(faults, lambda *_: None)(file, data)


def killing(file, data) -> None:
    """A fault that is kill -9, in the middle of a write."""
    if len(data) > 1:
        file.write(memoryview(data)[: len(data) // 2])
    os.kill(os.getpid(), signal.SIGKILL)


@contextmanager
def flushed(log: Path):
    """Every layer is flushed before the next begins, and it is written down which file has reached the disk up to where."""
    real, record_layer = os.fsync, resume.RunJournal.record_layer

    def fsync(descriptor: int) -> None:
        name, size = os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")), os.fstat(descriptor).st_size
        real(descriptor)
        with _REAL_OPEN(log, "a") as file:
            file.write(json.dumps([name, size]) + "\n")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        patch.setattr(
            resume.RunJournal, "record_layer", lambda self, *args: (record_layer(self, *args), self.wait_for_flush())
        )
        patch.setattr(resume, "_FLUSH_INTERVAL", 1)
        yield


def in_memory(path: Path) -> TensorSource:
    """The tensors of a file as a model holds them, which knows of no file."""
    return TensorSource(load_file(path), name="MODEL")


def run(
    source: Path,
    target: Path,
    recipe: Recipe,
    kind: str,
    at: int | None,
    overwrite: bool = False,
    log: Path | None = None,
    opened: Callable[[Path], Source | Path] = Path,
) -> None:
    """In a process of its own: quantize, and die at operation ``at`` of the disk, or at a look at the cancellation check."""
    checks = Disk(at if kind == "check" else None, killing)
    with flushed(log) if log else nullcontext(), Disk(at if kind == "disk" else None, killing).under():
        quantize_file(
            opened(source), target, recipe, device="cpu", overwrite=overwrite, check=lambda: checks.step("check")
        )


processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload([__name__])


def killed(*args) -> bool:
    """Whether :func:`run` was killed; it ends well otherwise."""
    process = processes.Process(target=run, args=args)
    process.start()
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode != 0
