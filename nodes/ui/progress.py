"""A run's events on their way to ComfyUI's progress bar and to the panels of all pages that show its workflow.

Every message names its prompt, its workflow and its place in the run, so that a page knows whether it missed one. The
messages of the latest runs are kept: a page that was reloaded, or opened in the middle of a run, asks for them once. How
a run ended is also an output of its node, for pages and workflows in which ComfyUI had the node's result at hand.
"""

import math
from collections import OrderedDict
from collections.abc import Mapping

from ...quant_core.errors import QuantizationError
from ...quant_core.events import (
    CalibrationAdvanced,
    CalibrationFinished,
    Event,
    LayerFinished,
    LayerKept,
    LayerMeasured,
    RunFinished,
    RunStarted,
)
from ...quant_core.run.report import Report
from .. import host

__all__ = ["EVENT", "ROUTE", "NodeProgress", "add_progress_route", "summary"]

EVENT = "learned_rounding.progress"
ROUTE = "/learned_rounding/progress"
_IDS = "LearnedRounding"  # begin so, those of our nodes
_SUMMARY = "learned_rounding"  # a node's output for its panel
_WORST = 5
_RUNS = 16  # whose messages are kept; 1 MB each for a model of 2,000 layers


def _reason(error: BaseException) -> str:
    """What all pages may know of an error; ComfyUI tells the page that queued the run the rest."""
    if isinstance(error, QuantizationError):
        return host.without_folders(str(error))
    return f"{type(error).__name__}: ComfyUI's log says more."


def _finite(value: float) -> float | None:
    return None if math.isnan(value) else value  # JSON has no NaN


def _started(event: RunStarted) -> dict:
    reasons = list(dict.fromkeys(layer.kept for layer in event.plan))
    return {
        "state": "start",
        "source": event.source,
        "format": event.format,
        "granularity": event.granularity,
        "rounding": event.rounding,
        "preset": event.preset,
        "total": event.layers,
        "kept": event.kept,
        "bytes_in": event.bytes_in,
        # [name, shape, place of the reason for which it is kept], reasons apart because most layers share a few
        "plan": [[layer.name, list(layer.shape), reasons.index(layer.kept)] for layer in event.plan],
        "reasons": reasons,
    }


def _layer(event: LayerFinished) -> dict:
    return {
        "state": "layer",
        "index": event.index,
        "total": event.total,
        "name": event.name,
        "shape": list(event.shape),
        "format": event.format,
        "granularity": event.granularity,
        "convrot": event.convrot,
        "error": event.weight_error,
        "output_error": event.output_error,
        "solver": event.solver,
        "gain": event.gain,
        "scale": event.scale,
        "seconds": event.seconds,
        "bytes_in": event.bytes_in,
        "bytes_out": event.bytes_out,
        "elapsed": event.elapsed,
        "eta": event.eta,
    }


def _kept(event: LayerKept) -> dict | None:
    return (
        None
        if event.planned
        else {"state": "kept", "name": event.name, "shape": list(event.shape), "reason": event.reason}
    )


def _finished(event: RunFinished) -> dict:
    report = event.report
    return {
        "state": "done",
        "source": report.source,
        "format": report.format,
        "granularity": report.granularity,
        "rounding": report.rounding,
        "layers": len(report.layers),
        "seconds": report.seconds,
        "bytes_in": report.bytes_in,
        "bytes_out": report.bytes_out,
        "median_error": _finite(report.median_error),
        "median_output_error": _finite(report.median_output_error),
        "median_gain": _finite(report.median_gain),
        "solvers": report.solvers,
        "worst": [
            {"name": layer.name, "error": layer.weight_error, "output_error": layer.output_error}
            for layer in _worst(report)
        ],
    }


def _worst(report: Report) -> list[LayerFinished]:
    """By falling error of the output, which the summary then tells, or of the weight where no output was measured."""
    measured = [layer for layer in report.layers if layer.output_error is not None]
    return sorted(measured, key=lambda layer: -layer.output_error)[:_WORST] or report.worst[:_WORST]


# What a page is told of an event; None for nothing.
_PAYLOADS = {
    LayerMeasured: lambda event: {"state": "measuring", **vars(event)},
    RunStarted: _started,
    LayerFinished: _layer,
    LayerKept: _kept,
    RunFinished: _finished,
    CalibrationAdvanced: lambda event: {"state": "calibrating", **vars(event)},
    CalibrationFinished: lambda event: {"state": "calibrated", **vars(event)},
}

# (workflow, node) → the messages of its latest run, the latest runs last.
_runs: OrderedDict[tuple[str, str], list[dict]] = OrderedDict()


def summary(event: RunFinished | CalibrationFinished) -> dict:
    """The output for the page (``ui``) that tells how a node's run ended, whether or not the page saw any of it."""
    return {_SUMMARY: [_PAYLOADS[type(event)](event)]}


def _messages_of(query: Mapping[str, str]) -> list[dict]:
    """{"node", "run"} with all messages of the latest run, in order, for each node of a workflow that ran lately.

    For others {"node", "output"}: what they put out for their panels last, a text or the summary of a run.

    Raises:
        ValueError: the query names no workflow.
    """
    if not query.get("workflow"):
        raise ValueError(f"{ROUTE} needs the id of a workflow: ?workflow=ID")
    runs = {
        node: list(messages) for (workflow, node), messages in tuple(_runs.items()) if workflow == query["workflow"]
    }
    outputs = host.latest_outputs(query["workflow"], _IDS, ("text", _SUMMARY))
    return [{"node": node, "run": messages} for node, messages in runs.items()] + [
        {"node": node, "output": output} for node, output in outputs.items() if node not in runs
    ]


def add_progress_route() -> None:
    """Answer pages that missed messages."""
    host.add_route(ROUTE, _messages_of)


class NodeProgress:
    """A listener for one node's run. As a context it tells the panels of a run that ends by an exception.

    Attributes:
        finished: the event that ended the run, None until then.
    """

    def __init__(self, node_id: str):
        self.finished: RunFinished | CalibrationFinished | None = None
        self._node = node_id
        self._bar = None
        self._run = {"node": node_id, **host.running_prompt()}
        self._messages: list[dict] | None = None

    def __call__(self, event: Event) -> None:
        if isinstance(event, LayerMeasured) and event.index == 0:
            self._bar = host.progress_bar(event.total, self._node)
        elif isinstance(event, RunStarted):
            self._bar = host.progress_bar(event.layers, self._node)
        elif isinstance(event, LayerMeasured):
            self._bar.update(1)
        elif isinstance(event, LayerFinished) or (isinstance(event, LayerKept) and not event.planned):
            self._bar.update(1)
        elif isinstance(event, RunFinished | CalibrationFinished):
            self.finished = event
        if payload := type(event) in _PAYLOADS and _PAYLOADS[type(event)](event):
            self._send(payload)

    def _send(self, payload: dict) -> None:
        if self._messages is None:
            self._messages = self._kept_messages()
        message = {**self._run, "seq": len(self._messages), **payload}
        self._messages.append(message)
        # Without a workflow no other page could tell whether the node is one of its own.
        host.send(EVENT, message, everyone=self._run["workflow"] is not None)

    def _kept_messages(self) -> list[dict]:
        """Where this run's messages go: behind those of the node's last one where that was of this prompt too.

        ComfyUI executes a node once for each item of a list.
        """
        if self._run["workflow"] is None:
            return []
        key = self._run["workflow"], self._node
        if key not in _runs or _runs[key][0]["prompt"] != self._run["prompt"]:
            _runs[key] = []
        _runs.move_to_end(key)
        while len(_runs) > _RUNS:
            _runs.popitem(last=False)
        return _runs[key]

    def __enter__(self) -> "NodeProgress":
        return self

    def __exit__(self, kind, error, trace) -> None:
        if error is not None:
            self._send({"state": "stopped", "reason": "interrupted" if host.is_interrupt(error) else _reason(error)})
