"""What happens during a run, as values. Progress bars, the widget and the report are listeners."""

from collections.abc import Callable
from dataclasses import dataclass

__all__ = [
    "Event",
    "LayerMeasured",
    "RunStarted",
    "LayerStarted",
    "LayerFinished",
    "LayerKept",
    "RunFinished",
    "Listener",
    "CancelCheck",
]


@dataclass(frozen=True)
class Event:
    """Base of all events."""


@dataclass(frozen=True)
class LayerMeasured(Event):
    """Before a run that chooses formats by measurement: it turns to one layer of ``total``; ``index`` counts from 0."""

    index: int
    total: int
    name: str


@dataclass(frozen=True)
class RunStarted(Event):
    """``layers``: how many will be quantized; ``kept``: tensors copied as they are; ``bytes_in``: source size in bytes."""

    source: str
    format: str
    granularity: str
    preset: str
    layers: int
    kept: int
    bytes_in: int


@dataclass(frozen=True)
class LayerStarted(Event):
    """``index`` counts from 0; ``shape`` is (out, in)."""

    index: int
    total: int
    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class LayerFinished(Event):
    """One quantized layer; times are in seconds, ``eta`` is what the whole run still needs.

    ``convrot`` is the group of its rotation. ``solver``, ``weight_error``, ``gain``, ``output_error`` and ``note`` are those of
    :class:`~learned_rounding.quant_core.formats.Rounded`.
    """

    index: int
    total: int
    name: str
    shape: tuple[int, ...]
    format: str
    granularity: str
    weight_error: float
    seconds: float
    bytes_in: int
    bytes_out: int
    elapsed: float
    eta: float
    solver: str = "nearest"
    gain: float | None = None
    output_error: float | None = None
    note: str = ""
    convrot: int | None = None


@dataclass(frozen=True)
class LayerKept(Event):
    """A tensor copied in its source dtype, or left out of the output (``removed``), and why."""

    name: str
    shape: tuple[int, ...]
    reason: str
    removed: bool = False
    planned: bool = True  # False: it was to be quantized, and could not be


@dataclass(frozen=True)
class RunFinished(Event):
    """``report`` is the :class:`~learned_rounding.quant_core.report.Report` of the run."""

    report: object


Listener = Callable[[Event], None]
CancelCheck = Callable[[], None]
"""Called often, raises to stop the run; nothing is left behind then."""
