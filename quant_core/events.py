"""What happens during a run, as values. Progress bars, the widget and the report are listeners."""

from collections.abc import Callable
from dataclasses import dataclass

__all__ = [
    "Event",
    "LayerMeasured",
    "PlannedLayer",
    "RunStarted",
    "LayerStarted",
    "LayerFinished",
    "LayerKept",
    "RunFinished",
    "CalibrationAdvanced",
    "CalibrationFinished",
    "Listener",
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
class PlannedLayer:
    """A weight of two or more dimensions; ``kept`` says why it stays as it is, empty where it is going to be quantized."""

    name: str
    shape: tuple[int, ...]
    kept: str = ""


@dataclass(frozen=True)
class RunStarted(Event):
    """``layers``: how many will be quantized; ``kept``: tensors copied as they are; ``bytes_in``: source size in bytes.

    ``plan``: all weights of two or more dimensions, in the order of the source. ``rounding``: what the recipe's comes to.
    """

    source: str
    format: str
    granularity: str
    preset: str
    layers: int
    kept: int
    bytes_in: int
    plan: tuple[PlannedLayer, ...] = ()
    rounding: str = ""


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

    ``convrot`` is the group of its rotation, ``scale`` the smallest and the largest of its scales. ``solver``, ``weight_error``,
    ``gain``, ``output_error`` and ``note`` are those of :class:`~learned_rounding.quant_core.formats.Rounded`.
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
    scale: tuple[float, float] | None = None


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
    """``report`` is the :class:`~learned_rounding.quant_core.run.report.Report` of the run."""

    report: object


@dataclass(frozen=True)
class CalibrationAdvanced(Event):
    """How far a calibration of ``layers`` layers is: ``done`` of ``total`` of its present ``unit``, 0 at the start.

    ``unit``: "steps" of the sampler over all pictures, "prompts" that are encoded, or, after either, "probes" of layers' sensitivity.
    ``elapsed``: seconds since the first of that unit began.
    """

    layers: int
    unit: str
    done: int
    total: int
    elapsed: float


@dataclass(frozen=True)
class CalibrationFinished(Event):
    """``tokens``: looked at for each of the ``layers`` at least; ``bytes``: of the file; ``seconds``: the whole calibration."""

    layers: int
    tokens: int
    bytes: int
    seconds: float


Listener = Callable[[Event], None]
