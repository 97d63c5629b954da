"""Send the events of a run to ComfyUI's progress bar and to the panels of all pages that show the workflow.

Every message has the ids of its prompt and workflow and a sequence number, so that a page detects missing messages. The
messages of the latest runs are stored for pages that are opened or reloaded during a run. The summary of a run is also an
output of its node, for pages and workflows in which the node is cached.
"""

import logging
import math
from collections.abc import Callable, Mapping
from typing import Any

from ...quant_core.errors import QuantizationError
from ...quant_core.events import (
    BlockAdvanced,
    BlockFinished,
    BlockStarted,
    CalibrationAdvanced,
    CalibrationFinished,
    DeviceFailed,
    Event,
    LayerFinished,
    LayerKept,
    LayerMeasured,
    OutputChecked,
    RunFinished,
    RunResumed,
    RunStarted,
)
from ...quant_core.run.report import Report
from .. import host
from .runs import Run, find_latest_runs, find_run, open_run, reuse_run

__all__ = ["COMPARISON", "EVENT", "ROUTE", "NodeProgress", "add_progress_route"]

EVENT = "learned_rounding.progress"
ROUTE = "/learned_rounding/progress"
_IDS = "LearnedRounding"  # prefix of the ids of our nodes
_SUMMARY = "learned_rounding"  # key of a node's output for its panel
COMPARISON = "learned_rounding_comparison"  # the same, of Compare
_WORST = 5
_WORKFLOW = 1000  # characters of the id of a workflow


def _public_reason(error: BaseException) -> str:
    """The message of an error for all pages, without folders; ComfyUI shows the full error on the page that queued the run."""
    if isinstance(error, QuantizationError):
        return host.shorten_paths(str(error))
    return f"{type(error).__name__}: see ComfyUI's log."


def _nan_to_none(value: float) -> float | None:
    """``value`` as JSON, which has no NaN."""
    return None if math.isnan(value) else value


def _start_message(event: RunStarted) -> dict:
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
        # [name, shape, index of its reason]; layers share a few reasons, so these are listed once
        "plan": [[layer.name, list(layer.shape), reasons.index(layer.kept)] for layer in event.plan],
        "reasons": reasons,
        "warnings": list(event.warnings),
    }


def _layer_message(event: LayerFinished) -> dict:
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


def _kept_message(event: LayerKept) -> dict | None:
    """The message of a layer that unexpectedly stays unquantized; planned ones are in the first message."""
    if event.planned:
        return None
    return {"state": "kept", "name": event.name, "shape": list(event.shape), "reason": event.reason}


def _end_message(event: RunFinished) -> dict:
    report = event.report
    assert isinstance(report, Report)
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
        "median_error": _nan_to_none(report.median_error),
        "median_output_error": _nan_to_none(report.median_output_error),
        "median_gain": _nan_to_none(report.median_gain),
        "solvers": report.solvers,
        "resumed": report.taken_up,
        "rotations": sorted({layer.convrot for layer in report.layers if layer.convrot}),
        "model_errors": _model_errors(report),
        "worst": [
            {"name": layer.name, "error": layer.weight_error, "output_error": layer.output_error}
            for layer in _worst_layers(report)
        ],
        "warnings": report.warnings,
    }


def _model_errors(report: Report) -> list[float]:
    """Error of the model's output, of a run that ran the model; one for each text encoder of a CLIP with several."""
    summaries = [part.sequential for part in report.parts.values()] or [report.sequential]
    return [summary.output_error for summary in summaries if summary and summary.output_error is not None]


def _worst_layers(report: Report) -> list[LayerFinished]:
    """Layers with the largest output error, or with the largest weight error where no output error was measured."""
    errors = [(layer.output_error, layer) for layer in report.layers if layer.output_error is not None]
    return [layer for _, layer in sorted(errors, key=lambda entry: -entry[0])[:_WORST]] or report.worst[:_WORST]


# Event → function of its message to pages, which may return None for no message.
_MESSAGES: dict[type, Callable[[Any], dict | None]] = {
    LayerMeasured: lambda event: {"state": "measuring", **vars(event)},
    RunStarted: _start_message,
    RunResumed: lambda event: {"state": "resumed", **vars(event)},
    BlockStarted: lambda event: {"state": "block", **vars(event)},
    BlockAdvanced: lambda event: {"state": "block", **vars(event)},
    BlockFinished: lambda event: {"state": "block", **vars(event)},
    LayerFinished: _layer_message,
    LayerKept: _kept_message,
    OutputChecked: lambda event: {"state": "checking", **vars(event)},
    RunFinished: _end_message,
    CalibrationAdvanced: lambda event: {"state": "calibrating", **vars(event)},
    CalibrationFinished: lambda event: {"state": "calibrated", **vars(event)},
}


def _answer_query(query: Mapping[str, str]) -> list[dict]:
    """{"node", "run"} with all messages of the latest run, in order, for each node of a workflow whose run is stored.

    For other nodes {"node", "output"}: their latest output for their panel, a text or the summary of a run, where possible with
    "run", the messages of the run, which was in another workflow.

    Raises:
        ValueError: the query has no workflow, or what no page could send.
    """
    if not 0 < len(query.get("workflow", "")) <= _WORKFLOW:
        raise ValueError(f"{ROUTE} requires the id of a workflow: ?workflow=ID")
    runs = find_latest_runs(query["workflow"])
    outputs = host.latest_outputs(query["workflow"], _IDS, ("text", _SUMMARY, COMPARISON))
    return [{"node": node, "run": list(run.messages)} for node, run in runs.items()] + [
        {"node": node, "output": output, **_find_messages(output)}
        for node, output in outputs.items()
        if node not in runs
    ]


def _find_messages(output: Mapping[str, list]) -> dict:
    """{"run": the messages of the run that an output is of}, if they are stored."""
    run = next((find_run(summary.get("id")) for summary in output.get(_SUMMARY, ())), None)
    return {"run": list(run.messages)} if run else {}


def add_progress_route() -> None:
    """Add the route from which pages get messages that they missed."""
    host.add_route(ROUTE, _answer_query)


class NodeProgress:
    """Listener for the run of one node. As a context manager it reports an exception that ends the run to the panels.

    Attributes:
        finished: the last event of a run that has ended.
    """

    def __init__(self, node_id: str):
        self._finished: RunFinished | CalibrationFinished | None = None
        self._node = node_id
        self._bar = None
        self._ids = {"node": node_id, **host.running_prompt()}
        self._run: Run | None = None

    @property
    def finished(self) -> RunFinished | CalibrationFinished:
        assert self._finished is not None, "the run has not ended"
        return self._finished

    def summarize(self, event: RunFinished | CalibrationFinished) -> dict:
        """The node's output for the page (``ui``): the last message of its run, which may be an earlier one with this result."""
        if isinstance(event, RunFinished):
            reuse_run(self._opened(), event.report)
        return {_SUMMARY: [{**(_MESSAGES[type(event)](event) or {}), "id": self._opened().id}]}

    def __call__(self, event: Event) -> None:
        if isinstance(event, LayerMeasured) and event.index == 0:
            self._bar = host.progress_bar(event.total, self._node)
        elif isinstance(event, RunStarted):
            self._bar = host.progress_bar(event.layers, self._node)
            if event.warnings:
                host.show_text("\n".join(event.warnings), logging.WARNING)
        elif isinstance(event, DeviceFailed):
            host.show_text(event.text, logging.WARNING)
        elif isinstance(event, RunFinished | CalibrationFinished):
            self._finished = event
            if isinstance(event, RunFinished):
                self._opened().results.append(event.report)
        elif isinstance(event, LayerMeasured | LayerFinished) or (isinstance(event, LayerKept) and not event.planned):
            assert self._bar is not None  # RunStarted or the first LayerMeasured precedes these events
            self._bar.update(1)
        if type(event) in _MESSAGES and (payload := _MESSAGES[type(event)](event)):
            self._send(payload)

    def _send(self, payload: dict) -> None:
        messages = self._opened().messages
        message = {**self._ids, "seq": len(messages), **payload}
        messages.append(message)
        # Without a workflow other pages cannot match the node id.
        host.send_message(EVENT, message, everyone=self._ids["workflow"] is not None)

    def _opened(self) -> Run:
        if self._run is None:
            self._run = open_run(self._ids["workflow"], self._node, self._ids["prompt"])
        return self._run

    def __enter__(self) -> "NodeProgress":
        return self

    def __exit__(self, kind, error, trace) -> None:
        if error is not None:
            self._send(
                {"state": "stopped", "reason": "interrupted" if host.is_interrupt(error) else _public_reason(error)}
            )
