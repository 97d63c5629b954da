"""One running ComfyUI: start it, queue workflows, read what happened, stop it."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import websocket  # the package websocket-client

from .install import Host

__all__ = ["ComfyServer", "Event", "HostError", "HostInterrupted", "Result"]

PACK = Path(__file__).resolve().parents[1]
PACK_NAME = "learned_rounding"
FOLDERS = ("custom_nodes", "models", "input", "output", "temp", "user")
LOG_TAIL_LINES = 40
STOP_SECONDS = 10
HOST_DEVICE = os.environ.get("LEARNED_ROUNDING_HOST_DEVICE", "cpu")
# A proxy set in the environment is not meant for 127.0.0.1.
_HTTP = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class HostError(RuntimeError):
    """ComfyUI refused or failed. The message carries ComfyUI's own words.

    kind         "start", "died", "timeout", "http", "validation" or "execution"
    node_id, node_type, exception_type, traceback   the failing node's (execution)
    node_errors  node id → what ComfyUI found wrong with its inputs (validation)
    events       what arrived before the failure
    """

    def __init__(self, message: str, *, kind: str, events: Iterable[Event] = (), **details: Any):
        super().__init__(message)
        self.kind = kind
        self.events = list(events)
        self.node_id: str | None = details.get("node_id")
        self.node_type: str | None = details.get("node_type")
        self.exception_type: str | None = details.get("exception_type")
        self.traceback: str = "".join(details.get("traceback") or ())
        self.node_errors: dict = details.get("node_errors") or {}


class HostInterrupted(HostError):
    """The workflow was interrupted before its end."""


@dataclass(frozen=True)
class Event:
    """One websocket message. `at` is in seconds after the workflow was queued."""

    type: str  # ComfyUI's or a node pack's name; "binary" for pictures sent while sampling
    data: Any  # the message's dict; bytes if binary
    at: float


@dataclass(frozen=True)
class Result:
    """What a finished workflow left behind."""

    prompt_id: str
    events: list[Event]
    outputs: dict[str, dict]  # node id → what its interface shows: {"images": […], "text": […]}
    history: dict = field(repr=False)  # ComfyUI's whole entry
    node_errors: dict  # outputs that were not run because their inputs are wrong; the others were
    images: list[Path]  # the picture files, in the order of outputs
    seconds: float

    def of(self, *types: str) -> list[Event]:
        """The events of these types, in order."""
        return [event for event in self.events if event.type in types]

    @property
    def executed(self) -> list[str]:
        """Ids of the nodes that ran, in order; cached ones are missing."""
        return [e.data["node"] for e in self.of("executing") if e.data.get("node") is not None]


class ComfyServer:
    """A ComfyUI process of its own, with its own folders, on a free port of 127.0.0.1.

        with ComfyServer(host) as server:
            server.queue({"1": {"class_type": "EmptyImage", "inputs": {…}}, …})

    base     its base directory (custom_nodes, models, input, output, temp, user); a temporary one unless given
    links    name in custom_nodes → folder; this repository as `learned_rounding` unless given; {} links nothing
    arguments, environment   additions to ComfyUI's command line and environment
    cpu      whether ComfyUI leaves the GPU alone; unless given, so it does, except with LEARNED_ROUNDING_HOST_DEVICE=cuda
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
        self.host = host
        self.links = {PACK_NAME: PACK} if links is None else dict(links)
        cpu = HOST_DEVICE == "cpu" if cpu is None else cpu
        self.arguments = [*(["--cpu"] if cpu else []), *arguments]
        self.environment = dict(environment or {})
        self.start_timeout = start_timeout
        self.start_seconds: float | None = None
        self.port: int | None = None
        self._own_base = base is None
        self.base = Path(tempfile.mkdtemp(prefix="comfyui-") if base is None else base).resolve()
        self._process: subprocess.Popen | None = None

    # ------------------------------------------------------------------------------------------------ life

    def __enter__(self) -> ComfyServer:
        try:
            return self.start()
        except BaseException:
            self.close()
            raise

    def __exit__(self, *_) -> None:
        self.close()

    def start(self) -> ComfyServer:
        """Starts the process and returns when it answers; raises HostError with the end of its log if it dies."""
        if self.running:
            return self
        for folder in FOLDERS:
            (self.base / folder).mkdir(parents=True, exist_ok=True)
        for name, target in self.links.items():
            link = self.base / "custom_nodes" / name
            if not link.is_symlink():
                link.symlink_to(Path(target).resolve(), target_is_directory=True)
        self.port = _free_port()
        begun = time.monotonic()
        with self.log_path.open("ab") as log:
            # cwd and PYTHONPATH keep this repository's `nodes` and `server` out of ComfyUI's imports.
            self._process = subprocess.Popen(
                self._command(),
                cwd=self.base,
                env=self._environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        self._await_answer(begun + self.start_timeout)
        self.start_seconds = time.monotonic() - begun
        return self

    def _command(self) -> list[str]:
        return [
            str(self.host.python), str(self.host.path / "main.py"),
            "--listen", "127.0.0.1", "--port", str(self.port), "--disable-auto-launch", "--disable-api-nodes",
            "--base-directory", str(self.base), "--database-url", "sqlite:///:memory:",
            "--front-end-root", str(self.host.frontend), *self.arguments,
        ]  # fmt: skip

    def _environment(self) -> dict[str, str]:
        return {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"PYTHONUNBUFFERED": "1"} | self.environment

    def _await_answer(self, deadline: float) -> None:
        while True:
            with contextlib.suppress(OSError):
                self._request("GET", "/system_stats", timeout=5)
                return
            with contextlib.suppress(subprocess.TimeoutExpired):
                code = self._process.wait(timeout=0.2)
                raise HostError(f"{self.host} exited with {code} while starting\n{self._log_tail()}", kind="start")
            if time.monotonic() > deadline:
                self.stop()
                raise HostError(
                    f"{self.host} did not answer within {self.start_timeout:.0f} s\n{self._log_tail()}", kind="start"
                )

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int | None:
        return self._process.pid if self.running else None

    def stop(self) -> None:
        """Ends the process; the folders stay."""
        if self.running:
            self._process.terminate()
            try:
                self._process.wait(timeout=STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._process = None

    def restart(self) -> ComfyServer:
        """Stops and starts again on the same folders: a new process that knows nothing of the old one."""
        self.stop()
        return self.start()

    def close(self) -> None:
        """Stops, and removes the base directory if it is a temporary one."""
        self.stop()
        if self._own_base:
            shutil.rmtree(self.base, ignore_errors=True)

    # --------------------------------------------------------------------------------------------- folders

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

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
        """Everything the process printed, over all starts."""
        return self.log_path.read_text(encoding="utf-8", errors="replace") if self.log_path.exists() else ""

    def _log_tail(self) -> str:
        return "\n".join(self.log_text().splitlines()[-LOG_TAIL_LINES:])

    # -------------------------------------------------------------------------------------------- requests

    def get(self, path: str, *, timeout: float = 60) -> Any:
        """GET a JSON answer."""
        return self._checked("GET", path, None, timeout)

    def post(self, path: str, body: Any = None, *, timeout: float = 60) -> Any:
        """POST JSON; the JSON answer, or None if it is empty."""
        return self._checked("POST", path, body, timeout)

    def object_info(self, node: str | None = None) -> dict:
        """Node class → its inputs and outputs; of one class if named."""
        return self.get("/object_info" + (f"/{urllib.parse.quote(node)}" if node else ""))

    def interrupt(self) -> None:
        """Stops the running workflow; its `queue` call then raises HostInterrupted."""
        self.post("/interrupt", {})

    def free(self) -> None:
        """Asks ComfyUI to unload models and drop cached results (done before the next workflow)."""
        self.post("/free", {"unload_models": True, "free_memory": True})

    def _checked(self, method: str, path: str, body: Any, timeout: float) -> Any:
        try:
            return self._request(method, path, body, timeout)
        except urllib.error.HTTPError as error:
            words = error.read().decode(errors="replace")
            raise HostError(f"{method} {path}: {error.code}\n{words}", kind="http") from None
        except OSError as error:
            raise self._lost(f"{method} {path}: {error}", []) from error

    def _request(self, method: str, path: str, body: Any = None, timeout: float = 60) -> Any:
        request = urllib.request.Request(self.url + path, method=method, headers={"Content-Type": "application/json"})
        if body is not None:
            request.data = json.dumps(body).encode()
        with _HTTP.open(request, timeout=timeout) as answer:
            text = answer.read()
        try:
            return json.loads(text) if text else None
        except ValueError:
            return text.decode(errors="replace")

    def _lost(self, what: str, events: list[Event]) -> HostError:
        # A process that crashed closes its sockets a moment before it can be waited for.
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = self._process.wait(timeout=2) if self._process else None
            return HostError(f"{self.host} died (exit {code})\n{self._log_tail()}", kind="died", events=events)
        return HostError(f"{what}\n{self._log_tail()}", kind="http", events=events)

    # ----------------------------------------------------------------------------------------------- queue

    def queue(
        self,
        workflow: Mapping[str, dict],
        *,
        timeout: float = 300,
        on_event: Callable[[Event], None] | None = None,
        client_id: str | None = None,
    ) -> Result:
        """Runs a workflow in API form to its end and returns all that happened.

        `on_event` is called for each event as it arrives, in this thread; it may call `interrupt`.
        Raises HostError when ComfyUI refuses the workflow, a node fails, the process dies or `timeout` passes
        (the workflow is then interrupted), and HostInterrupted when it was interrupted.
        ComfyUI keeps results: nodes whose inputs did not change since the last workflow are not run again.
        """
        client_id = client_id or uuid.uuid4().hex
        deadline = time.monotonic() + timeout
        try:
            socket_ = websocket.create_connection(
                f"ws://127.0.0.1:{self.port}/ws?clientId={client_id}", timeout=timeout, http_no_proxy=["127.0.0.1"]
            )
        except (OSError, websocket.WebSocketException) as error:
            raise self._lost(f"websocket: {error}", []) from error
        with contextlib.closing(socket_):
            socket_.recv()  # the first status message: from here on ComfyUI knows this listener
            begun = time.monotonic()
            prompt_id, node_errors = self._submit(workflow, client_id)
            events: list[Event] = []
            for event in self._listen(socket_, begun, deadline, events, prompt_id):
                events.append(event)
                if on_event:
                    on_event(event)
        _raise_failure(events, prompt_id)
        return self._result(prompt_id, events, node_errors)

    def _submit(self, workflow: Mapping[str, dict], client_id: str) -> tuple[str, dict]:
        try:
            answer = self._request("POST", "/prompt", {"prompt": workflow, "client_id": client_id})
        except urllib.error.HTTPError as error:
            words = error.read().decode(errors="replace")
            try:
                answer = json.loads(words)
            except ValueError:
                raise HostError(f"POST /prompt: {error.code}\n{words}", kind="http") from None
            raise HostError(
                _validation_text(answer), kind="validation", node_errors=answer.get("node_errors")
            ) from None
        except OSError as error:
            raise self._lost(f"POST /prompt: {error}", []) from error
        return answer["prompt_id"], answer.get("node_errors") or {}

    def _listen(self, socket_, begun: float, deadline: float, events: list[Event], prompt_id: str):
        """Yields events up to and including the one that ComfyUI sends when the history entry is written."""
        while True:
            try:
                socket_.settimeout(max(deadline - time.monotonic(), 0.001))
                message = socket_.recv()
            except (TimeoutError, websocket.WebSocketTimeoutException):
                with contextlib.suppress(HostError):
                    self.interrupt()
                seen = ", ".join(event.type for event in events[-8:])
                raise HostError(
                    f"the workflow did not end in time; last events: {seen or 'none'}\n{self._log_tail()}",
                    kind="timeout",
                    events=events,
                ) from None
            except (OSError, websocket.WebSocketException) as error:
                raise self._lost(f"websocket: {error}", events) from error
            at = time.monotonic() - begun
            if isinstance(message, bytes):
                yield Event("binary", message, at)
                continue
            if not message:
                raise self._lost("the websocket was closed", events)
            message = json.loads(message)
            data = message.get("data") or {}
            yield Event(message["type"], data, at)
            if message["type"] == "executing" and data.get("node") is None and data.get("prompt_id") == prompt_id:
                return

    def _result(self, prompt_id: str, events: list[Event], node_errors: dict) -> Result:
        history = self.get(f"/history/{prompt_id}")[prompt_id]
        outputs = history.get("outputs", {})
        images = [
            self.base / image["type"] / image["subfolder"] / image["filename"]
            for output in outputs.values()
            for image in output.get("images", ())
            if isinstance(image, dict) and "filename" in image
        ]
        return Result(prompt_id, events, outputs, history, node_errors, images, events[-1].at)


def _raise_failure(events: list[Event], prompt_id: str) -> None:
    for event in events:
        if not isinstance(event.data, dict) or event.data.get("prompt_id") != prompt_id:
            continue
        where = f"node {event.data.get('node_id')} ({event.data.get('node_type')})"
        if event.type == "execution_error":
            words = f"{event.data.get('exception_type')}: {event.data.get('exception_message')}"
            raise HostError(f"{where}: {words}", kind="execution", events=events, **event.data)
        if event.type == "execution_interrupted":
            raise HostInterrupted(f"interrupted at {where}", kind="execution", events=events, **event.data)


def _validation_text(answer: dict) -> str:
    """ComfyUI's refusal of a workflow in one line each for the whole and for every faulty input."""
    error = answer.get("error") or {}
    if not isinstance(error, dict):
        return str(error)
    lines = [" ".join(filter(None, [error.get("message"), error.get("details")]))]
    for node_id, found in (answer.get("node_errors") or {}).items():
        for reason in found.get("errors", ()):
            words = ": ".join(filter(None, [reason.get("message"), reason.get("details")]))
            lines.append(f"node {node_id} ({found.get('class_type')}): {words}")
    return "\n".join(lines)


def _free_port() -> int:
    """A port nobody listens on, below those the system gives to outgoing connections: none of them can take it
    in the seconds before ComfyUI opens it."""
    for port in random.sample(range(20000, 32000), 50):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise HostError("no free port between 20000 and 32000", kind="start")
