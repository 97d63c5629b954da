"""HTTP and websocket client of a ComfyUI server: JSON requests, and workflows run to completion."""

from __future__ import annotations

import contextlib
import json
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import websocket  # of the package websocket-client

from .results import Event, HostError, Result, describe_validation_error, raise_failure

__all__ = ["ComfyClient"]

# Requests to 127.0.0.1 ignore the proxy settings of the environment.
_HTTP = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class ComfyClient(ABC):
    """Client of the ComfyUI on a port of 127.0.0.1 whose base directory is ``base``."""

    def __init__(self, base: Path, port: int | None = None):
        self.base = base
        self.port = port

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @abstractmethod
    def log_tail(self) -> str:
        """Last lines of the server's log, for error messages."""

    @abstractmethod
    def connection_error(self, message: str, events: list[Event]) -> HostError:
        """Error for a failed connection: the process has ended, or it does not respond."""

    # -------------------------------------------------------------------------------------------- requests

    def get(self, path: str, *, timeout: float = 60) -> Any:
        """Send a GET request; returns the JSON response."""
        return self._checked_request("GET", path, None, timeout)

    def post(self, path: str, body: Any = None, *, timeout: float = 60) -> Any:
        """Send a POST request with a JSON body; returns the JSON response, or None if it is empty."""
        return self._checked_request("POST", path, body, timeout)

    def object_info(self, node: str | None = None) -> dict:
        """Node definitions by class: inputs and outputs; of one class if ``node`` is given."""
        return self.get("/object_info" + (f"/{urllib.parse.quote(node)}" if node else ""))

    def interrupt(self) -> None:
        """Interrupt the running workflow; its ``queue`` call then raises HostInterrupted."""
        self.post("/interrupt", {})

    def free(self, *, unload_models: bool = True, free_memory: bool = True) -> None:
        """Request that ComfyUI unloads models, and that it drops cached results.

        It does so before the second workflow from now on; the first one may be executed before.
        """
        self.post("/free", {"unload_models": unload_models, "free_memory": free_memory})

    def _checked_request(self, method: str, path: str, body: Any, timeout: float) -> Any:
        try:
            return self.request(method, path, body, timeout)
        except urllib.error.HTTPError as error:
            text = error.read().decode(errors="replace")
            raise HostError(f"{method} {path}: {error.code}\n{text}", kind="http") from None
        except OSError as error:
            raise self.connection_error(f"{method} {path}: {error}", []) from error

    def request(self, method: str, path: str, body: Any = None, timeout: float = 60) -> Any:
        """Send a request; returns the decoded JSON response, the text if it is not JSON, or None if it is empty.

        Raises:
            OSError: the server cannot be reached, or (urllib.error.HTTPError) it responds with an error status.
        """
        request = urllib.request.Request(self.url + path, method=method, headers={"Content-Type": "application/json"})
        if body is not None:
            request.data = json.dumps(body).encode()
        with _HTTP.open(request, timeout=timeout) as response:
            text = response.read()
        try:
            return json.loads(text) if text else None
        except ValueError:
            return text.decode(errors="replace")

    # ----------------------------------------------------------------------------------------------- queue

    def queue(
        self,
        workflow: Mapping[str, dict],
        *,
        timeout: float = 300,
        on_event: Callable[[Event], None] | None = None,
        client_id: str | None = None,
    ) -> Result:
        """Run a workflow in API format to completion.

        ComfyUI caches results: a node whose inputs have not changed since the last workflow is not executed again.

        Args:
            workflow: node id → {"class_type": …, "inputs": {…}}.
            timeout: time limit in s, after which the workflow is interrupted.
            on_event: called in this thread for each event; it may call ``interrupt``.
            client_id: websocket client id; random by default.

        Raises:
            HostError: ComfyUI rejects the workflow, a node fails, the process ends, or the time limit is exceeded.
            HostInterrupted: the workflow was interrupted.
        """
        client_id = client_id or uuid.uuid4().hex
        deadline = time.monotonic() + timeout
        try:
            socket = websocket.create_connection(
                f"ws://127.0.0.1:{self.port}/ws?clientId={client_id}", timeout=timeout, http_no_proxy=["127.0.0.1"]
            )
        except (OSError, websocket.WebSocketException) as error:
            raise self.connection_error(f"websocket: {error}", []) from error
        with contextlib.closing(socket):
            socket.recv()  # the first status message: from now on ComfyUI sends events to this client
            start = time.monotonic()
            prompt_id, node_errors = self._submit(workflow, client_id)
            events: list[Event] = []
            for event in self._listen(socket, start, deadline, events, prompt_id):
                events.append(event)
                if on_event:
                    on_event(event)
        raise_failure(events, prompt_id)
        return self._load_result(prompt_id, events, node_errors)

    def _submit(self, workflow: Mapping[str, dict], client_id: str) -> tuple[str, dict]:
        """Queue a workflow; returns its prompt id and the errors of skipped output nodes."""
        try:
            answer = self.request("POST", "/prompt", {"prompt": workflow, "client_id": client_id})
        except urllib.error.HTTPError as error:
            text = error.read().decode(errors="replace")
            try:
                answer = json.loads(text)
            except ValueError:
                raise HostError(f"POST /prompt: {error.code}\n{text}", kind="http") from None
            raise HostError(
                describe_validation_error(answer), kind="validation", node_errors=answer.get("node_errors")
            ) from None
        except OSError as error:
            raise self.connection_error(f"POST /prompt: {error}", []) from error
        return answer["prompt_id"], answer.get("node_errors") or {}

    def _listen(
        self, socket: websocket.WebSocket, start: float, deadline: float, events: list[Event], prompt_id: str
    ) -> Iterator[Event]:
        """Yield events up to and including the one that ComfyUI sends once the history entry is complete."""
        while True:
            try:
                socket.settimeout(max(deadline - time.monotonic(), 0.001))
                message = socket.recv()
            except (TimeoutError, websocket.WebSocketTimeoutException):
                with contextlib.suppress(HostError):
                    self.interrupt()
                last = ", ".join(event.type for event in events[-8:])
                raise HostError(
                    f"the workflow did not complete in time; last events: {last or 'none'}\n{self.log_tail()}",
                    kind="timeout",
                    events=events,
                ) from None
            except (OSError, websocket.WebSocketException) as error:
                raise self.connection_error(f"websocket: {error}", events) from error
            at = time.monotonic() - start
            if isinstance(message, bytes):
                yield Event("binary", message, at)
                continue
            if not message:
                raise self.connection_error("the websocket was closed", events)
            message = json.loads(message)
            data = message.get("data") or {}
            yield Event(message["type"], data, at)
            if message["type"] == "executing" and data.get("node") is None and data.get("prompt_id") == prompt_id:
                return

    def _load_result(self, prompt_id: str, events: list[Event], node_errors: dict) -> Result:
        history = self.get(f"/history/{prompt_id}")[prompt_id]
        outputs = history.get("outputs", {})
        images = [
            self.base / image["type"] / image["subfolder"] / image["filename"]
            for output in outputs.values()
            for image in output.get("images", ())
            if isinstance(image, dict) and "filename" in image
        ]
        return Result(prompt_id, events, outputs, history, node_errors, images, events[-1].at)
