"""Tasks that worker processes run in tests; a pickled task names this module, which they import."""

import os
import socket
from dataclasses import dataclass, field
from pathlib import Path

import torch

from learned_rounding.quant_core.errors import OutOfMemoryError, RecipeError

__all__ = ["Add", "CheckForever", "Die", "DieAlways", "Fail", "Gate", "Hold", "NeedMemory", "Print", "process_id"]


@dataclass(frozen=True)
class Add:
    """Adds one to a tensor, and sends an event."""

    tensor: torch.Tensor

    def run(self, device, emit, check, *, cpu_fallback):
        emit(("added", str(device)))
        return self.tensor + 1


@dataclass(frozen=True)
class Fail:
    """Raises an error: one of ours, or one that cannot be pickled."""

    ours: bool = True

    def run(self, device, emit, check, *, cpu_fallback):
        if self.ours:
            raise RecipeError("no such format", option="format")
        error = ValueError("with a function")
        error.function = lambda: None
        raise error


@dataclass(frozen=True)
class Die:
    """Ends its process where ``mark`` does not exist, and creates it first; otherwise returns the process id."""

    mark: Path

    def run(self, device, emit, check, *, cpu_fallback):
        try:
            self.mark.touch(exist_ok=False)
        except FileExistsError:
            return os.getpid()
        os._exit(3)


@dataclass(frozen=True)
class DieAlways:
    """Ends its process."""

    title = "layer a"

    def run(self, device, emit, check, *, cpu_fallback):
        os._exit(3)


@dataclass(frozen=True)
class NeedMemory:
    """Has too little memory without the CPU's; returns whether that was allowed."""

    marks: Path

    def run(self, device, emit, check, *, cpu_fallback):
        (self.marks / f"{os.getpid()} {cpu_fallback}").touch()
        if not cpu_fallback:
            raise OutOfMemoryError("cuda:9 has too little memory for layer a, 8×8.")
        return cpu_fallback


@dataclass(frozen=True)
class Hold:
    """Reports its name to a :class:`Gate` and waits until that lets it go; returns the name."""

    port: int
    name: str

    def run(self, device, emit, check, *, cpu_fallback):
        with socket.create_connection(("127.0.0.1", self.port)) as connection:
            connection.sendall(self.name.encode())
            connection.shutdown(socket.SHUT_WR)
            connection.recv(1)
        return self.name


@dataclass(frozen=True)
class CheckForever:
    """Calls the cancellation check until that raises."""

    def run(self, device, emit, check, *, cpu_fallback):
        while True:
            check()


@dataclass(frozen=True)
class Print:
    """Prints to what was standard output, from Python and past it."""

    def run(self, device, emit, check, *, cpu_fallback):
        print("a library prints")
        os.write(1, b"from C\n")


@dataclass(frozen=True)
class _ProcessId:
    def run(self, device, emit, check, *, cpu_fallback):
        return os.getpid()


process_id = _ProcessId()


@dataclass
class Gate:
    """What running :class:`Hold` tasks wait for; a context manager."""

    _server: socket.socket = field(default_factory=lambda: socket.create_server(("127.0.0.1", 0)))
    _held: dict[str, socket.socket] = field(default_factory=dict)

    @property
    def port(self) -> int:
        return self._server.getsockname()[1]

    def arrivals(self, count: int) -> set[str]:
        """Wait for ``count`` further tasks to run; returns their names."""
        self._server.settimeout(120)
        names = set()
        for _ in range(count):
            connection, _ = self._server.accept()
            connection.settimeout(120)
            name = b"".join(iter(lambda connection=connection: connection.recv(100), b"")).decode()
            self._held[name] = connection
            names.add(name)
        return names

    def release(self, name: str) -> None:
        """Let a task go."""
        self._held.pop(name).close()

    def __enter__(self) -> "Gate":
        return self

    def __exit__(self, *_) -> None:
        for connection in (self._server, *self._held.values()):
            connection.close()
