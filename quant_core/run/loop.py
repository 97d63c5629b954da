"""The quantization loop: every tensor of a plan from the source to the sink, layer by layer, with events on the way."""

import logging
from collections.abc import Generator, Iterator, Mapping
from contextlib import closing

import torch

from ..calibration import Calibration, LayerStatistics, input_scale
from ..cancellation import CancelCheck
from ..errors import CalibrationError, NonFiniteWeightError, NothingToQuantizeError
from ..events import LayerFinished, LayerKept, LayerStarted, Listener, PlannedLayer, RunResumed, RunStarted
from ..formats import QuantizedBank, QuantizedWeight
from ..layer import Layer
from ..quantize_bank import quantize_bank
from ..quantize_layer import quantize_layer
from ..recipes import Plan, Recipe
from ..sources import Source
from ..sources.source import CPU
from .blocks import BlockQueue, FinishedLayers, StartedLayer, base_name
from .clock import Clock
from .io_threads import LayerWriter, TensorSink, compute_ahead, read_ahead
from .memory import explain_out_of_memory
from .report import Report
from .resume import LayerEvent, RunJournal

__all__ = ["QuantizationRun", "read_device"]

log = logging.getLogger(__name__)

NON_FINITE = "contains NaN or Inf, so it stays unquantized"
UNSEEN = "not calibrated: the calibration has no activations of experts"
BIAS_CORRECTED = "bias of a quantized layer, corrected for the mean output error"


class QuantizationRun:
    """One run over a plan.

    The next tensors are read and the previous layers are written by threads while a layer is quantized on ``device``.

    Args:
        source: where tensors are read.
        plan: decision for every tensor of the source.
        recipe: recipe of the run.
        calibration: statistics of input activations; layers without are rounded as if uncalibrated.
        sink: where tensors are added.
        journal: journal that the sink has opened; its layers are not quantized again. None: the run cannot be resumed.
        device: device of the arithmetic.
        emit: listener of the events.
        check: called often; raises to cancel.
        blocks: layers that are rounded block by block with a running model; None for layer by layer.

    Attributes:
        report: grows with the run.
        configs: layer → JSON configuration.
    """

    def __init__(
        self,
        source: Source,
        plan: Plan,
        recipe: Recipe,
        calibration: Calibration | None,
        *,
        sink: TensorSink,
        journal: RunJournal | None,
        device: torch.device,
        emit: Listener,
        check: CancelCheck,
        blocks: BlockQueue | None = None,
    ):
        self._source, self._plan, self._recipe, self._calibration = source, plan, recipe, calibration
        self._journal, self._device, self._emit, self._check = journal, device, emit, check
        self._writer = LayerWriter(sink, journal, check)
        self._blocks = blocks
        self._order = sorted(plan.output_names(), key=blocks.position) if blocks else list(plan.output_names())
        quantized = [name for name in self._order if plan.decisions[name].action == "quantize"]
        self._numbers = {name: index for index, name in enumerate(quantized)}
        self._total = len(quantized)
        self._done: set[str] = set()  # source tensors of the layers of a killed run
        self._statistics: Iterator[LayerStatistics] = iter(())
        self._biases = _corrected_biases(plan, recipe, calibrated=calibration is not None)
        self.configs: dict[str, dict[str, object]] = {}
        self.report = Report.for_plan(source.name, plan, recipe, calibrated=calibration is not None)
        self.report.bytes_in = sum(info.nbytes for info in source.tensors.values())
        self.report.device = str(device)
        self._clock = Clock(self.report.bytes_in)

    def execute(self) -> None:
        """Quantize, copy or remove every tensor of the plan.

        Raises:
            NothingToQuantizeError: every layer contains NaN or Inf.
        """
        self._emit_start()
        for name in self._plan.names("remove"):
            self._report_tensor(self._kept(name, self._plan.decisions[name].reason, removed=True))
        self._done = self._restore_finished_layers()
        reads = self._remaining_reads()
        with self._writer, closing(self._read_statistics(reads)) as self._statistics:
            for name, tensor in read_ahead(self._source, reads, self._check):
                self._check()
                if self._plan.decisions[name].action == "keep":
                    self._copy_tensor(name, tensor)
                else:
                    self._quantize_layer(name, tensor)
                del tensor  # its memory is free before the thread reads the next tensor
        if not self.configs:
            raise NothingToQuantizeError(
                f"{self._source.name}: every layer to quantize {NON_FINITE}; the model is damaged."
            )
        if self._blocks:
            self.report.sequential = self._blocks.finish(self.report.layers)
        self.report.seconds = self._clock.elapsed

    def _emit_start(self) -> None:
        self._emit(
            RunStarted(
                source=self._source.name,
                format=self.report.format,
                granularity=self.report.granularity,
                preset=self.report.preset,
                layers=self._total,
                kept=len(self._source.tensors) - self._total,
                bytes_in=self.report.bytes_in,
                plan=tuple(self._planned_layers()),
                rounding=self.report.rounding,
                warnings=self._plan.warnings,
            )
        )

    def _planned_layers(self) -> Iterator[PlannedLayer]:
        for name in self._plan.output_names():
            shape, decision = self._source.tensors[name].shape, self._plan.decisions[name]
            if name.endswith(".weight") and len(shape) > 1:
                yield PlannedLayer(name=name, shape=shape, kept=decision.reason if decision.action == "keep" else "")

    def _restore_finished_layers(self) -> set[str]:
        """Report the layers of a killed run as if this run had made them; returns the names of their source tensors."""
        if self._journal is None or not self._journal.layers:
            return set()
        for layer in self._journal.layers:
            if layer.config:
                self.configs[base_name(layer.events[0].name)] = layer.config
            for event in layer.events:
                self._clock.exclude(self._source.tensors[event.name].nbytes)
                if isinstance(event, LayerFinished):
                    self._emit(LayerStarted(index=event.index, total=self._total, name=event.name, shape=event.shape))
                self._report_tensor(event)
        self.report.taken_up = len(self.report.layers)
        self._emit(RunResumed(layers=self.report.taken_up, total=self._total, elapsed=self._clock.elapsed))
        log.info("%s: resuming: %d of %d layers already done", self._source.name, self.report.taken_up, self._total)
        return {event.name for layer in self._journal.layers for event in layer.events}

    def _remaining_reads(self) -> list[tuple[str, torch.device]]:
        """(name, device) of the tensors to read; biases that may be corrected are read with their weight.

        A block of which some layers are missing is rounded again as a whole.
        """
        skipped = self._done | set(self._biases.values())
        if self._blocks:
            skipped -= self._blocks.restore(self._done, self.configs)
        return [
            (name, read_device(self._source, self._plan, name, self._device))
            for name in self._order
            if name not in skipped
        ]

    def _read_statistics(self, reads: list[tuple[str, torch.device]]) -> Generator[LayerStatistics, None, None]:
        """Yield the statistics of each weight to quantize in turn, read ahead by a thread."""
        calibration = self._calibration
        if calibration is None:
            return

        def read(name: str) -> LayerStatistics:
            statistics = calibration.layer_statistics(base_name(name)) or LayerStatistics()
            try:
                return statistics.move_hessian(self._device)
            except torch.OutOfMemoryError:
                return statistics

        weights = [name for name, _ in reads if self._plan.decisions[name].action == "quantize"]
        yield from compute_ahead(read, weights, self._check)

    def _copy_tensor(self, name: str, tensor: torch.Tensor) -> None:
        self._write_layer({name: tensor}, self._kept(name, self._plan.decisions[name].reason))

    def _quantize_layer(self, name: str, weight: torch.Tensor) -> None:
        """Quantize one weight and correct its bias, when the layers of its block are read; a weight with NaN or Inf is copied."""
        if name not in self._done:
            shape = self._source.tensors[name].shape
            self._emit(LayerStarted(index=self._numbers[name], total=self._total, name=name, shape=shape))
        source_tensors, bias_name = {name: weight}, self._biases.get(name)
        if bias_name is not None:
            source_tensors[bias_name] = self._source.read(bias_name)
        started = StartedLayer(name, source_tensors, bias_name, self._clock.elapsed)
        layer, finished = None, FinishedLayers()
        try:
            layer, quantized = self._round(started)
            finished = [(started, quantized)]
        except NonFiniteWeightError:
            self._copy_damaged(started)
        if self._blocks:
            finished = self._blocks.add(started, layer, finished)
        for each, quantized in finished:
            self._finish_layer(each, quantized)

    def _copy_damaged(self, started: StartedLayer) -> None:
        if started.name not in self._done:
            damaged = self._kept(started.name, NON_FINITE, planned=False)
            self._write_layer(started.tensors, damaged, *self._kept_bias(started.bias_name))

    def _finish_layer(self, started: StartedLayer, quantized: QuantizedWeight | QuantizedBank) -> None:
        """Write a quantized layer, and report it."""
        name, layer = started.name, base_name(started.name)
        if name in self._done:
            return
        tensors = quantized.tensors(layer)
        self.configs[layer] = quantized.config
        size = sum(tensor.nbytes for tensor in tensors.values())
        self._writer.wait_for_room(size)  # the time of a layer includes that of writing earlier ones
        finished = self._finished(name, quantized, bytes_out=size, began=started.began)
        corrected = quantized.bias is not started.bias
        self._write_layer(tensors, finished, *self._kept_bias(started.bias_name, corrected=corrected))

    def _round(self, started: StartedLayer) -> tuple[Layer | None, QuantizedWeight | QuantizedBank]:
        """Quantize one weight or bank with the recipe and the calibration statistics of its layer; None for the layer of a bank."""
        name, bias = started.name, started.bias
        weight = started.tensors[name]
        layer, recipe = base_name(name), self._recipe.of(self._plan.decisions[name])
        statistics, rounding = LayerStatistics(), recipe.rounding
        if self._calibration is not None:
            statistics = next(self._statistics)
            rounding = rounding if statistics.hessian is not None else rounding.uncalibrated()
        shape = "×".join(map(str, weight.shape))
        try:
            with explain_out_of_memory(f"{self._device} has too little memory for layer {layer}, {shape}"):
                if weight.ndim == 3:
                    codec = recipe.format.codec_for(weight.shape[-1])
                    bank = quantize_bank(
                        weight,
                        bias,
                        statistics,
                        codec,
                        rounding,
                        device=self._device,
                        seed=recipe.seed,
                        check=self._check,
                    )
                    return None, bank
                given = Layer(weight=weight, bias=bias, statistics=statistics)
                return given, quantize_layer(
                    given,
                    recipe.format.codecs(weight.shape[1]),
                    rounding,
                    input_scale=_static_input_scale(recipe, statistics),
                    seed=recipe.seed,
                    check=self._check,
                )
        except CalibrationError as error:
            raise CalibrationError(f"{layer}: {error}", tensor=name) from error

    def _finished(
        self,
        name: str,
        quantized: QuantizedWeight | QuantizedBank,
        *,
        bytes_out: int,
        began: float,
    ) -> LayerFinished:
        """The event of a quantized layer; advances the clock."""
        info, codec, scale_range = self._source.tensors[name], quantized.codec, quantized.scale_range
        eta = self._clock.advance(info.nbytes)
        elapsed = self._clock.elapsed
        return LayerFinished(
            index=self._numbers[name],
            total=self._total,
            name=name,
            shape=info.shape,
            format=codec.format.name,
            granularity=codec.granularity,
            weight_error=quantized.weight_error,
            seconds=elapsed - began,
            bytes_in=info.nbytes,
            bytes_out=bytes_out,
            elapsed=elapsed,
            eta=eta,
            solver=quantized.solver,
            gain=quantized.gain,
            output_error=quantized.output_error,
            note="; ".join(filter(None, (quantized.note, *self._notes(name, quantized)))),
            convrot=codec.rotation and codec.rotation.size,
            scale=scale_range,
        )

    def _notes(self, name: str, quantized: QuantizedWeight | QuantizedBank) -> Iterator[str]:
        """For the report: why a bank is not calibrated, and why the layer has another format than the recipe's."""
        if isinstance(quantized, QuantizedBank) and self._calibration is not None and quantized.output_error is None:
            yield UNSEEN
        decision = self._plan.decisions[name]
        if decision.fallback:
            yield f"in {quantized.codec.format.name}: {decision.reason}"

    def _kept(self, name: str, reason: str, *, removed: bool = False, planned: bool = True) -> LayerKept:
        """The event of a tensor that is copied or removed; advances the clock."""
        info = self._source.tensors[name]
        self._clock.advance(info.nbytes)
        return LayerKept(name=name, shape=info.shape, reason=reason, removed=removed, planned=planned)

    def _kept_bias(self, name: str | None, *, corrected: bool = False) -> list[LayerKept]:
        if name is None:
            return []
        return [self._kept(name, BIAS_CORRECTED if corrected else self._plan.decisions[name].reason)]

    def _write_layer(self, tensors: Mapping[str, torch.Tensor], *events: LayerEvent) -> None:
        """Hand the tensors of a layer to the writer and report its events, the first of which is of its weight."""
        self.report.bytes_out += sum(tensor.nbytes for tensor in tensors.values())
        self._writer.add(tensors, events, self.configs.get(base_name(events[0].name)))
        for event in events:
            self._report_tensor(event)

    def _report_tensor(self, event: LayerEvent) -> None:
        """Add an event to the report and emit it."""
        if isinstance(event, LayerFinished):
            self.report.layers.append(event)
        else:
            self.report.kept.append(event)
        self._emit(event)


def read_device(source: Source, plan: Plan, name: str, device: torch.device) -> torch.device:
    """The device that a source tensor is read to: ``device`` for layers to quantize, else the CPU.

    Banks of experts are read to the CPU; an expert takes a small part of their memory.
    """
    matrix = len(source.tensors[name].shape) == 2
    return device if matrix and plan.decisions[name].action == "quantize" else CPU


def _corrected_biases(plan: Plan, recipe: Recipe, *, calibrated: bool) -> dict[str, str]:
    """Weight → bias of the layers whose bias may be corrected; both are read and written together."""
    correction = recipe.rounding.get("bias_correction")
    if correction == "none" or (correction == "auto" and not calibrated):
        return {}
    pairs = ((name, base_name(name) + ".bias") for name in plan.names("quantize"))
    return {name: bias for name, bias in pairs if bias in plan.decisions and plan.decisions[bias].action == "keep"}


def _static_input_scale(recipe: Recipe, statistics: LayerStatistics) -> float | None:
    """Static scale of the input activations, if the format has one and the calibration the statistics for it."""
    if statistics.histogram is None or statistics.amax is None or not recipe.format.codec.static_activations:
        return None
    return input_scale(statistics.histogram, float(statistics.amax.max()))
