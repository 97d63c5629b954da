"""ComfyUI server process: start and stop it, on its own folders and port."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

from .client import ComfyClient
from .install import Host
from .results import Event, HostError

__all__ = ["HOST_DEVICE", "PACK", "PACK_NAME", "ComfyServer"]

PACK = Path(__file__).resolve().parents[1]
PACK_NAME = "learned_rounding"
FOLDERS = ("custom_nodes", "models", "input", "output", "temp", "user")
LOG_TAIL_LINES = 40
STOP_SECONDS = 10
HOST_DEVICE = os.environ.get("LEARNED_ROUNDING_HOST_DEVICE", "cpu")


class ComfyServer(ComfyClient):
    """ComfyUI process with its own folders, on a free port of 127.0.0.1.

        with ComfyServer(host) as server:
            server.queue({"1": {"class_type": "EmptyImage", "inputs": {…}}, …})

    Args:
        host: the ComfyUI to start.
        base: base directory (custom_nodes, models, input, output, temp, user); a temporary one by default.
        links: name in custom_nodes → folder to link; this repository as ``learned_rounding`` by default, {} for none.
        arguments: additional command-line arguments of ComfyUI.
        environment: additional environment variables.
        cpu: run ComfyUI on the CPU; by default unless LEARNED_ROUNDING_HOST_DEVICE=cuda.
        start_timeout: time limit of ``start`` in s.
    """

    def __init__(
        self,
        host: Host,
        *,
        base: Path | str | None = None,
        links: Mapping[str, Path | str] | None = None,
        arguments: Iterable[str] = (),
        environment: Mapping[str, str] | None = None,
        cpu: bool | None = None,
        start_timeout: float = 240,
    ):
        super().__init__(Path(tempfile.mkdtemp(prefix="comfyui-") if base is None else base).resolve())
        self.host = host
        self.links = {PACK_NAME: PACK} if links is None else dict(links)
        cpu = HOST_DEVICE == "cpu" if cpu is None else cpu
        self.arguments = [*(["--cpu"] if cpu else []), *arguments]
        self.environment = dict(environment or {})
        self.start_timeout = start_timeout
        self.start_seconds: float | None = None
        self._has_temporary_base = base is None
        self._process: subprocess.Popen | None = None
        self._reservation: socket.socket | None = None

    # --------------------------------------------------------------------------------------------- process

    def __enter__(self) -> ComfyServer:
        try:
            return self.start()
        except BaseException:
            self.close()
            raise

    def __exit__(self, *_) -> None:
        self.close()

    def start(self) -> ComfyServer:
        """Start the process and wait until it responds.

        Raises:
            HostError: the process exits or does not respond in time; the message ends with its log.
        """
        if self.running:
            return self
        self._end_process()
        for folder in FOLDERS:
            (self.base / folder).mkdir(parents=True, exist_ok=True)
        for name, target in self.links.items():
            link = self.base / "custom_nodes" / name
            if not os.path.lexists(link):
                _link_folder(link, Path(target).resolve())
        self._reservation = self._reservation or _reserve_port()
        self.port = self._reservation.getsockname()[1]
        start = time.monotonic()
        with self.log_path.open("ab") as log:
            # cwd and PYTHONPATH keep this repository's `nodes` and `server` out of ComfyUI's imports.
            self._process = subprocess.Popen(
                self._build_command(),
                cwd=self.base,
                env=self._build_environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        self._wait_for_response(self._process, start + self.start_timeout)
        self.start_seconds = time.monotonic() - start
        return self

    def _build_command(self) -> list[str]:
        return [
            str(self.host.python), str(self.host.path / "main.py"),
            "--listen", "127.0.0.1", "--port", str(self.port), "--disable-auto-launch", "--disable-api-nodes",
            "--base-directory", str(self.base), "--database-url", "sqlite:///:memory:",
            "--front-end-root", str(self.host.frontend), *self.arguments,
        ]  # fmt: skip

    def _build_environment(self) -> dict[str, str]:
        return {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"PYTHONUNBUFFERED": "1"} | self.environment

    def _wait_for_response(self, process: subprocess.Popen, deadline: float) -> None:
        while True:
            with contextlib.suppress(OSError):
                self.request("GET", "/system_stats", timeout=5)
                return
            with contextlib.suppress(subprocess.TimeoutExpired):
                code = process.wait(timeout=0.2)
                raise HostError(f"{self.host} exited with {code} during startup\n{self.log_tail()}", kind="start")
            if time.monotonic() > deadline:
                self.stop()
                raise HostError(
                    f"{self.host} did not respond within {self.start_timeout:.0f} s\n{self.log_tail()}", kind="start"
                )

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process is not None and self.running else None

    def stop(self) -> None:
        """Stop the process and release its port; the folders are kept."""
        self._end_process()
        if self._reservation is not None:
            self._reservation.close()
            self._reservation = None

    def _end_process(self) -> None:
        if self._process is not None and self.running:
            self._process.terminate()
            try:
                self._process.wait(timeout=STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._process = None

    def restart(self) -> ComfyServer:
        """Stop the process and start a new one on the same folders and port, so that pages reconnect."""
        self._end_process()
        return self.start()

    def close(self) -> None:
        """Stop the process and remove the base directory if it is temporary."""
        self.stop()
        if self._has_temporary_base:
            shutil.rmtree(self.base, ignore_errors=True)

    # --------------------------------------------------------------------------------------------- folders

    @property
    def input_dir(self) -> Path:
        return self.base / "input"

    @property
    def output_dir(self) -> Path:
        return self.base / "output"

    @property
    def models_dir(self) -> Path:
        return self.base / "models"

    @property
    def log_path(self) -> Path:
        return self.base / "server.log"

    def log_text(self) -> str:
        """Output of the process over all starts."""
        return self.log_path.read_text(encoding="utf-8", errors="replace") if self.log_path.exists() else ""

    # ---------------------------------------------------------------------------------------------- errors

    def log_tail(self) -> str:
        return "\n".join(self.log_text().splitlines()[-LOG_TAIL_LINES:])

    def connection_error(self, message: str, events: list[Event]) -> HostError:
        # A crashed process closes its sockets shortly before its exit code is available.
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = self._process.wait(timeout=2) if self._process else None
            return HostError(f"{self.host} died (exit {code})\n{self.log_tail()}", kind="died", events=events)
        return HostError(f"{message}\n{self.log_tail()}", kind="http", events=events)


def _link_folder(link: Path, target: Path) -> None:
    """Create a symbolic link to a folder, or a junction, for which users of Windows need no privilege."""
    try:
        link.symlink_to(target, target_is_directory=True)
    except OSError:
        with contextlib.suppress(ImportError):
            from _winapi import CreateJunction

            CreateJunction(str(target), str(link))
            return
        raise


def _reserve_port() -> socket.socket:
    """Bind a socket to an unused port below the ephemeral range, which no outgoing connection can take before ComfyUI opens it.

    While the socket is open, other processes that reserve ports find this one in use. ComfyUI can listen on it, because it sets
    SO_REUSEADDR as this socket does once it is bound.
    """
    for port in random.sample(range(20000, 32000), 50):
        reservation = socket.socket()
        try:
            reservation.bind(("127.0.0.1", port))
            reservation.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            return reservation
        except OSError:
            reservation.close()
    raise HostError("no free port between 20000 and 32000; stop other servers", kind="start")
