"""Candidates of format measured: the formats to try, and the size, error and time of a layer in each of them.

Each layer is quantized in every candidate format and run on its validation activations, quantized as ComfyUI quantizes them on
the card. Errors are those of the rounding that the run uses. Formats of 4 bits are rounded so for every layer; the errors of
formats of 8 bits are those of round to nearest times a ratio, measured on the first layer of each type and format.

Formats of 4 bits are candidates where the target asks for less than 8 bits. W6A8 is not a candidate, since stock ComfyUI 0.33 does
not read it.
"""

import re
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace

import torch

from ..calibration import Calibration, LayerStatistics
from ..cancellation import CancelCheck, wait_for
from ..errors import NonFiniteWeightError
from ..events import LayerMeasured, Listener
from ..formats import GROUP_SIZES, INT4, Codec, FormatConfig, QuantizedWeight
from ..formats.cards import find_support
from ..layer import Layer, output_error
from ..quantize_layer import quantize_layer
from ..recipes import Recipe
from ..rounding import RoundingConfig
from ..sources import Source
from ..workers import TaskPool
from .allocation import Option
from .card_times import CardTimes
from .layer_task import move_statistics
from .memory import explain_layer_memory

__all__ = [
    "BLOCKS",
    "EIGHT_BITS",
    "FEWER_ACTIVATION_BITS",
    "FEW_BITS",
    "MICROSCALING",
    "LayerMeter",
    "MeasureTask",
    "Measurement",
    "find_candidates",
    "find_codec",
]

_MAX_ROWS = 512  # of validation activations

EIGHT_BITS = (
    FormatConfig("int8_tensorwise", "row"),
    *(FormatConfig("int8_tensorwise", "row", convrot=size) for size in GROUP_SIZES),
    FormatConfig("float8_e4m3fn", "tensor"),
)
FEW_BITS = tuple(FormatConfig(name) for name in ("asym_w4a8_int8", "nvfp4", "convrot_w4a4"))
FEWER_ACTIVATION_BITS = FormatConfig("convrot_w4a4", linear_dtype="int4")  # faster, with more error at the same size
MICROSCALING = FormatConfig("mxfp8")  # of no use on cards that do not multiply it
BLOCKS = (FormatConfig("int8_blockwise", "block"), FormatConfig("float8_e4m3fn_blockwise", "block"))


def find_candidates(recipe: Recipe, capability: tuple[int, int] | None, *, few_bits: bool) -> tuple[FormatConfig, ...]:
    """The formats to try for every layer.

    Args:
        capability: compute capability of the card that the model is for; None: any.
        few_bits: whether formats below 8 bits are tried.
    """
    native = capability is not None and find_support(MICROSCALING.codec, capability) == "native"
    faster = recipe.target_time is not None and FEWER_ACTIVATION_BITS.codec.activation_elements(capability) is INT4
    return (
        *EIGHT_BITS,
        *(FEW_BITS if few_bits else ()),
        *([FEWER_ACTIVATION_BITS] if few_bits and faster else []),
        *([MICROSCALING] if native else []),
        *(BLOCKS if recipe.block_formats else ()),
    )


def find_codec(format: FormatConfig, shape: tuple[int, int]) -> Codec | None:
    """The codec of a layer (out, in); None where it cannot be stored, or only with a smaller ConvRot group."""
    codec = format.codecs(shape[1])[0]
    smaller = type(format.convrot) is int and (codec.rotation is None or codec.rotation.size != format.convrot)
    return None if smaller or codec.admits(shape) else codec


@dataclass(frozen=True)
class Measurement:
    """A layer in one candidate format.

    Attributes:
        format: the candidate.
        codec: the one of least error.
        size: bytes of the layer's tensors.
        error: of the layer's output, by round to nearest or, if ``final``, by the rounding of the run.
        final: see ``error``.
        ratio: error by the rounding of the run relative to ``error``; None where it was not measured.
    """

    format: FormatConfig
    codec: Codec
    size: int
    error: float
    final: bool
    ratio: float | None = None


@dataclass(frozen=True)
class MeasureTask:
    """A :class:`~..workers.Task`: quantize one weight in several formats.

    Attributes:
        name: of the layer.
        weight: (out, in).
        statistics: of the activations.
        formats: those that can hold its shape.
        compared: formats of 8 bits whose ratio is measured.
        rounding: of the run.
        capability: compute capability of the card that the model is for; None: any.
    """

    name: str
    weight: torch.Tensor
    statistics: LayerStatistics
    formats: Sequence[FormatConfig]
    compared: Collection[FormatConfig]
    rounding: RoundingConfig
    capability: tuple[int, int] | None

    @property
    def title(self) -> str:
        return f"formats of layer {self.name}"

    def load(self, device: torch.device) -> "MeasureTask":
        """The task with the weight and the Hessian on a device."""
        return replace(self, weight=self.weight.to(device), statistics=move_statistics(self.statistics, device))

    def run(
        self, device: torch.device, emit: Listener, check: CancelCheck, *, cpu_fallback: bool
    ) -> list[Measurement] | None:
        """A measurement of each format; None for a weight with NaN or Inf."""
        with explain_layer_memory(device, self.name, self.weight.shape):
            task, rows = self.load(device), self.statistics.validation_activations
            rows = None if rows is None else rows[:_MAX_ROWS].to(device, torch.float32)
            try:
                return [task._measure(format, rows, check, cpu_fallback) for format in self.formats]
            except NonFiniteWeightError:
                return None

    def _measure(
        self,
        format: FormatConfig,
        rows: torch.Tensor | None,
        check: CancelCheck,
        cpu_fallback: bool,
    ) -> Measurement:
        weight, known = self.weight, self.statistics

        def quantize(statistics: LayerStatistics, rounding: RoundingConfig) -> tuple[QuantizedWeight, float]:
            made = quantize_layer(
                Layer(weight, statistics=statistics),
                format.codecs(weight.shape[1]),
                rounding,
                check=check,
                cpu_fallback=cpu_fallback,
            )
            if rows is not None:
                return made, output_error(weight.float(), made, rows, self.capability)
            return made, made.weight_error if made.output_error is None else made.output_error

        def describe(made: QuantizedWeight, error: float, *, final: bool, ratio: float | None = None) -> Measurement:
            size = sum(tensor.nbytes for tensor in made.tensors(self.name).values())
            return Measurement(format, made.codec, size, error, final, ratio)

        if known.hessian is not None and format.codec.weight_bits < 8:
            return describe(*quantize(known, self.rounding), final=True)
        hessian = known.hessian if rows is None else None
        nearest, error = quantize(LayerStatistics(hessian), RoundingConfig("auto" if hessian is None else "nearest"))
        if known.hessian is None:
            return describe(nearest, error, final=True)
        if format not in self.compared:
            return describe(nearest, error, final=False)
        _, final = quantize(known, self.rounding)
        return describe(nearest, error, final=False, ratio=final / error if error else 1.0)


_Kind = tuple[str, tuple[int, ...], FormatConfig]
"""Layers with the same ratio: name with * for numbers, shape, format."""


@dataclass
class LayerMeter:
    """Measures the candidates of layers.

    Attributes:
        candidates: formats to try.
        capability: compute capability of the card that the model is for; None: any.
        times: of layers on that card; None: times are not needed.
        pool: devices that measure.
        device: where weights are read to.
        check: called often; raises to cancel.
    """

    source: Source
    recipe: Recipe
    calibration: Calibration
    candidates: Iterable[FormatConfig]
    capability: tuple[int, int] | None
    times: CardTimes | None
    pool: TaskPool
    device: torch.device
    check: CancelCheck
    _ratios: dict[_Kind, float] = field(default_factory=dict)

    def measure(self, sensitivities: Mapping[str, float], emit: Listener) -> Iterator[tuple[str, list[Option]]]:
        """Yield each weight with its options: unquantized, and every candidate that its shape allows; the former alone for
        NaN or Inf.

        Args:
            sensitivities: name of a weight → squared relative error of the model output per squared relative error of the
                layer's.
            emit: called with the start of each layer.
        """
        pending: deque[tuple[str, Future]] = deque()
        compared = set(self._ratios)  # kinds whose ratio a pending or finished layer measures
        for index, name in enumerate(sensitivities):
            self.check()
            emit(LayerMeasured(index=index, total=len(sensitivities), name=name))
            task = self._make_task(name, compared)
            compared.update(self._kinds(name, task.formats))
            pending.append((name, self.pool.submit(task, task.weight.nbytes)))
            del task
            while len(pending) >= self.pool.capacity:
                yield self._finish(*pending.popleft(), sensitivities)
        while pending:
            yield self._finish(*pending.popleft(), sensitivities)

    def _make_task(self, name: str, compared: Collection[_Kind]) -> MeasureTask:
        weight = self.source.read(name, self.device)
        layer, shape = name.removesuffix(".weight"), (weight.shape[0], weight.shape[1])
        formats = [
            format for format in self.candidates if find_codec(format, shape)
        ]  # a smaller group is one of its own
        kinds = self._kinds(name, formats)
        return MeasureTask(
            layer,
            weight.to(self.pool.device),
            self.calibration.layer_statistics(layer) or LayerStatistics(),
            formats,
            {kind[-1] for kind in kinds if kind not in compared},
            self.recipe.rounding,
            self.capability,
        )

    def _kinds(self, name: str, formats: Iterable[FormatConfig]) -> list[_Kind]:
        pattern, shape = re.sub(r"\d+", "*", name), self.source.tensors[name].shape
        return [(pattern, tuple(shape), format) for format in formats]

    def _finish(
        self, name: str, future: "Future[list[Measurement] | None]", sensitivities: Mapping[str, float]
    ) -> tuple[str, list[Option]]:
        info = self.source.tensors[name]
        shape = info.shape[0], info.shape[1]
        time = self.times.find(None, shape) if self.times else None
        options = [Option(info.nbytes, 0.0, time=time)]
        found = wait_for(future, self.check)
        for measured in found or ():
            error = measured.error if measured.final else measured.error * self._ratio(name, measured)
            time = self.times.find(measured.codec, shape) if self.times else None
            options.append(Option(measured.size, sensitivities[name] * error**2, measured.format, time))
        return name, options

    def _ratio(self, name: str, measured: Measurement) -> float:
        """The ratio of the first layer of a kind; of this one where all before it have NaN or Inf."""
        (kind,) = self._kinds(name, [measured.format])
        if kind not in self._ratios:
            ratio = measured.ratio
            if ratio is None:
                task = replace(self._make_task(name, ()), formats=[measured.format], compared={measured.format})
                found = wait_for(self.pool.submit(task, task.weight.nbytes), self.check)
                ratio = found[0].ratio
            self._ratios[kind] = ratio
        return self._ratios[kind]
