"""Events of a run. Progress bars, the progress panel and the report are listeners."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

__all__ = [
    "BlockAdvanced",
    "BlockFinished",
    "BlockStarted",
    "BlockStep",
    "CalibrationAdvanced",
    "CalibrationFinished",
    "DeviceFailed",
    "Event",
    "LayerFinished",
    "LayerKept",
    "LayerMeasured",
    "LayerStarted",
    "Listener",
    "OutputChecked",
    "PlannedLayer",
    "RunFinished",
    "RunResumed",
    "RunStarted",
]


@dataclass(frozen=True)
class Event:
    """Base class of all events."""


@dataclass(frozen=True)
class LayerMeasured(Event):
    """Bit allocation begins to measure one layer, before the run starts.

    Attributes:
        index: number of the layer, from 0.
        total: number of layers to measure.
        name: name of the weight.
    """

    index: int
    total: int
    name: str


@dataclass(frozen=True)
class PlannedLayer:
    """A weight with two or more dimensions.

    Attributes:
        name: name of the weight.
        shape: its shape.
        kept: reason why it stays unquantized, empty if it is to be quantized.
    """

    name: str
    shape: tuple[int, ...]
    kept: str = ""


@dataclass(frozen=True)
class RunStarted(Event):
    """A run starts.

    Attributes:
        source: name of the source.
        format, granularity, preset: of the recipe.
        layers: number of layers to quantize.
        kept: number of other tensors.
        bytes_in: size of the source tensors in bytes.
        plan: all weights with two or more dimensions, in the order of the source.
        rounding: rounding of the recipe, with "auto" resolved.
        warnings: sentences for the user, of the :class:`~.recipes.Plan`.
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
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class RunResumed(Event):
    """The layers of a killed run are restored; their events precede this one.

    Attributes:
        layers: number of restored layers.
        total: number of layers to quantize.
        elapsed: time in s since the run started.
    """

    layers: int
    total: int
    elapsed: float


@dataclass(frozen=True)
class LayerStarted(Event):
    """The run begins to quantize one layer.

    Attributes:
        index: number of the layer, from 0.
        total: number of layers to quantize.
        name: name of the weight.
        shape: its shape, (out, in).
    """

    index: int
    total: int
    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class BlockStarted(Event):
    """Sequential rounding begins with one block of the model.

    Attributes:
        index: number of the block, from 0.
        total: number of blocks.
        name: path of its module in the model.
    """

    index: int
    total: int
    name: str


BlockStep = Literal["rounding", "comparing", "reconstructing", "running"]
"""Rounding of groups of layers that share an input; validation calls that compare the results; gradient steps; calls that go on
to the next block."""


@dataclass(frozen=True)
class BlockAdvanced(Event):
    """Progress inside a block; pages store every event, so a block has some dozens at most.

    Attributes:
        index, total, name: as in :class:`BlockStarted`.
        step: what is done.
        done, total_steps: finished and all groups, calls or gradient steps of it.
    """

    index: int
    total: int
    name: str
    step: BlockStep
    done: int
    total_steps: int


@dataclass(frozen=True)
class BlockFinished(Event):
    """The layers of one block are rounded and compared; errors are relative ones of its outputs in the validation calls.

    Attributes:
        index, total, name: as in :class:`BlockStarted`.
        kept: rounding that was kept.
        error, calibrated_error: with it, and with calibrated rounding, with activations as the card quantizes them.
        weights_only_error: with unquantized activations; None where the card quantizes none.
        note: one sentence for users, empty when there is nothing to report.
    """

    index: int
    total: int
    name: str
    kept: str
    error: float
    calibrated_error: float
    weights_only_error: float | None
    note: str = ""


@dataclass(frozen=True)
class LayerFinished(Event):
    """One layer is quantized.

    Attributes:
        index, total, name, shape: as in :class:`LayerStarted`.
        format, granularity: of this layer.
        seconds: time of this layer in s.
        bytes_in, bytes_out: size of the weight in the source, and of the tensors of the layer in the output.
        elapsed: time in s since the run started.
        eta: time in s that the rest of the run takes.
        solver, weight_error, gain, output_error, note: see :class:`~learned_rounding.quant_core.formats.Rounded`.
        convrot: group size of the rotation, None without one.
        scale: smallest and largest scale.
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
    """A tensor is copied unquantized, or removed.

    Attributes:
        name, shape: of the tensor.
        reason: why it is not quantized.
        removed: it is not in the output.
        planned: False for a layer that was to be quantized but cannot be.
    """

    name: str
    shape: tuple[int, ...]
    reason: str
    removed: bool = False
    planned: bool = True


@dataclass(frozen=True)
class DeviceFailed(Event):
    """A device of several could not quantize a layer, which another one repeats.

    Attributes:
        device: name of the device.
        lost: it is no longer used; otherwise it had too little memory for the layer.
        text: sentence for users.
    """

    device: str
    lost: bool
    text: str


@dataclass(frozen=True)
class OutputChecked(Event):
    """The complete output file is read again and compared with the checksums of its tensors, before it gets its name.

    Attributes:
        done, total: checked and all bytes of its tensors.
    """

    done: int
    total: int


@dataclass(frozen=True)
class RunFinished(Event):
    """The run is over; ``report`` is its :class:`~learned_rounding.quant_core.run.report.Report`."""

    report: object


@dataclass(frozen=True)
class CalibrationAdvanced(Event):
    """Progress of a calibration.

    Attributes:
        layers: number of layers.
        unit: "steps" of the sampler over all images, "prompts" to encode, or "probes" of the sensitivity of layers.
        done, total: finished and all units, from 0.
        elapsed: time in s since the first unit of this kind began.
    """

    layers: int
    unit: str
    done: int
    total: int
    elapsed: float


@dataclass(frozen=True)
class CalibrationFinished(Event):
    """A calibration is over.

    Attributes:
        layers: number of layers.
        tokens: smallest number of tokens that a layer was calibrated with.
        bytes: size of the calibration file.
        seconds: time of the whole calibration in s.
    """

    layers: int
    tokens: int
    bytes: int
    seconds: float


Listener = Callable[[Event], None]
"""Called with every event of a run."""
