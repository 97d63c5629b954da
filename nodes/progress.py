"""A run's events on their way to ComfyUI's progress bar and to the widget."""

import math

from ..quant_core.events import Event, LayerFinished, LayerKept, LayerMeasured, RunFinished, RunStarted
from . import host

__all__ = ["EVENT", "NodeProgress"]

EVENT = "learned_rounding.progress"
_WORST = 5


def _finite(value: float) -> float | None:
    return None if math.isnan(value) else value  # JSON has no NaN


def _layer(event: LayerFinished) -> dict:
    return {
        "state": "layer",
        "index": event.index,
        "total": event.total,
        "name": event.name,
        "shape": list(event.shape),
        "format": event.format,
        "granularity": event.granularity,
        "error": event.weight_error,
        "output_error": event.output_error,
        "solver": event.solver,
        "gain": event.gain,
        "seconds": event.seconds,
        "bytes_in": event.bytes_in,
        "bytes_out": event.bytes_out,
        "elapsed": event.elapsed,
        "eta": event.eta,
    }


def _finished(event: RunFinished) -> dict:
    report = event.report
    return {
        "state": "done",
        "layers": len(report.layers),
        "seconds": report.seconds,
        "bytes_in": report.bytes_in,
        "bytes_out": report.bytes_out,
        "median_error": _finite(report.median_error),
        "median_output_error": _finite(report.median_output_error),
        "median_gain": _finite(report.median_gain),
        "solvers": report.solvers,
        "worst": [{"name": layer.name, "error": layer.weight_error} for layer in report.worst[:_WORST]],
    }


_PAYLOADS = {
    LayerMeasured: lambda event: {
        "state": "measuring",
        "index": event.index,
        "total": event.total,
        "name": event.name,
    },
    RunStarted: lambda event: {
        "state": "start",
        "source": event.source,
        "format": event.format,
        "granularity": event.granularity,
        "preset": event.preset,
        "total": event.layers,
        "kept": event.kept,
        "bytes_in": event.bytes_in,
    },
    LayerFinished: _layer,
    RunFinished: _finished,
}


class NodeProgress:
    """A listener for one node's run. As a context it tells the widget of a run that ends by an exception."""

    def __init__(self, node_id: str):
        self._node = node_id
        self._bar = None

    def __call__(self, event: Event) -> None:
        if isinstance(event, LayerMeasured) and event.index == 0:
            self._bar = host.progress_bar(event.total, self._node)
        elif isinstance(event, RunStarted):
            self._bar = host.progress_bar(event.layers, self._node)
        elif isinstance(event, LayerMeasured):
            self._bar.update(1)
        elif isinstance(event, LayerFinished) or (isinstance(event, LayerKept) and not event.planned):
            self._bar.update(1)
        if isinstance(event, LayerKept) and not event.planned:
            self._send({"state": "kept", "name": event.name, "reason": event.reason})
        elif type(event) in _PAYLOADS:
            self._send(_PAYLOADS[type(event)](event))

    def _send(self, payload: dict) -> None:
        host.send(EVENT, {"node": self._node, **payload})

    def __enter__(self) -> "NodeProgress":
        return self

    def __exit__(self, kind, error, trace) -> None:
        if error is not None:
            self._send({"state": "stopped", "reason": "interrupted" if host.is_interrupt(error) else str(error)})
