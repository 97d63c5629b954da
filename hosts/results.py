"""Events, results and errors of a workflow that ComfyUI ran."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["Event", "HostError", "HostInterrupted", "Result", "describe_validation_error", "raise_failure"]


class HostError(RuntimeError):
    """ComfyUI rejected or failed a workflow, or its process ended. The message includes ComfyUI's own message.

    Attributes:
        kind: "start", "died", "timeout", "http", "validation" or "execution".
        node_id, node_type, exception_type, traceback: the failed node ("execution").
        node_errors: node id → errors of its inputs ("validation").
        events: events received before the failure.
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
    """The workflow was interrupted."""


@dataclass(frozen=True)
class Event:
    """One websocket message.

    Attributes:
        type: event name of ComfyUI or a node pack; "binary" for preview images.
        data: the message's dict; bytes if binary.
        at: time in s since the workflow was queued.
    """

    type: str
    data: Any
    at: float


@dataclass(frozen=True)
class Result:
    """Outcome of a completed workflow.

    Attributes:
        prompt_id: ComfyUI's id of the run.
        events: all websocket messages, in order.
        outputs: node id → its UI output: {"images": […], "text": […]}.
        history: ComfyUI's complete history entry.
        node_errors: errors of output nodes that were skipped because of invalid inputs.
        images: image files, in the order of outputs.
        seconds: duration of the run.
    """

    prompt_id: str
    events: list[Event]
    outputs: dict[str, dict]
    history: dict = field(repr=False)
    node_errors: dict
    images: list[Path]
    seconds: float

    def of(self, *types: str) -> list[Event]:
        """Events of the given types, in order."""
        return [event for event in self.events if event.type in types]

    @property
    def executed(self) -> list[str]:
        """Ids of the executed nodes, in order; cached nodes are not included."""
        return [e.data["node"] for e in self.of("executing") if e.data.get("node") is not None]


def raise_failure(events: list[Event], prompt_id: str) -> None:
    """Raise the failure that the events of a run report, if any.

    Raises:
        HostError: a node failed.
        HostInterrupted: the run was interrupted.
    """
    for event in events:
        if not isinstance(event.data, dict) or event.data.get("prompt_id") != prompt_id:
            continue
        where = f"node {event.data.get('node_id')} ({event.data.get('node_type')})"
        if event.type == "execution_error":
            cause = f"{event.data.get('exception_type')}: {event.data.get('exception_message')}"
            raise HostError(f"{where}: {cause}", kind="execution", events=events, **event.data)
        if event.type == "execution_interrupted":
            raise HostInterrupted(f"interrupted at {where}", kind="execution", events=events, **event.data)


def describe_validation_error(answer: dict) -> str:
    """ComfyUI's validation error as text: one line for the workflow and one per invalid input."""
    error = answer.get("error") or {}
    if not isinstance(error, dict):
        return str(error)
    lines = [" ".join(filter(None, [error.get("message"), error.get("details")]))]
    for node_id, found in (answer.get("node_errors") or {}).items():
        for reason in found.get("errors", ()):
            text = ": ".join(filter(None, [reason.get("message"), reason.get("details")]))
            lines.append(f"node {node_id} ({found.get('class_type')}): {text}")
    return "\n".join(lines)
