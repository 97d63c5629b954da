"""The part of a run that concerns one output: what is quantized for it, its events, its report and its writer."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from ..cancellation import CancelCheck
from ..errors import NonFiniteWeightError, NothingToQuantizeError
from ..events import (
    DeviceFailed,
    LayerFinished,
    LayerKept,
    LayerStarted,
    Listener,
    PlannedLayer,
    RunResumed,
    RunStarted,
)
from ..recipes import Plan, Recipe
from ..sources import Source
from ..workers import DeviceFailure
from .blocks import BlockQueue, StartedLayer, base_name
from .clock import Clock
from .io_threads import LayerWriter, TensorSink
from .layer_task import LayerOrder, LayerResult
from .report import Report
from .resume import LayerEvent, RunJournal

__all__ = ["OutputRun"]

log = logging.getLogger(__name__)

NON_FINITE = "contains NaN or Inf, so it stays unquantized"
UNSEEN = "not calibrated: the calibration has no activations of experts"
BIAS_CORRECTED = "bias of a quantized layer, corrected for the mean output error"


class OutputRun:
    """One output of a run. The loop calls :meth:`start`, then :meth:`copy` and :meth:`finish_layer` in the order of the
    output, then :meth:`finish`; a context manager, which waits for the last layer to be written.

    Args:
        source: where tensors are read.
        plan: decision for every tensor of the source.
        recipe: recipe of the output.
        calibrated: whether there is a calibration.
        sink: where tensors are added.
        journal: journal that the sink has opened; its layers are not quantized again. None: the run cannot be resumed.
        devices: names of the devices, for the report.
        emit: listener of the events.
        check: called often; raises to cancel.
        blocks: layers that are rounded block by block with a running model; None for layer by layer.

    Attributes:
        report: grows with the run.
        configs: layer → JSON configuration.
        plan, recipe, blocks: as given.
        order: names of the source tensors, as they are read and written.
        done: source tensors of the layers of a killed run, after :meth:`start`.
        biases: weight → bias of the layers whose bias may be corrected; both are read and written together.
    """

    def __init__(
        self,
        source: Source,
        plan: Plan,
        recipe: Recipe,
        *,
        calibrated: bool,
        sink: TensorSink,
        journal: RunJournal | None,
        devices: str,
        emit: Listener,
        check: CancelCheck,
        blocks: BlockQueue | None = None,
    ):
        self.plan, self.recipe, self.blocks = plan, recipe, blocks
        self._source, self._calibrated, self._journal, self._emit = source, calibrated, journal, emit
        self._writer = LayerWriter(sink, journal, check)
        self.order = sorted(plan.output_names(), key=blocks.position) if blocks else list(plan.output_names())
        quantized = [name for name in self.order if plan.decisions[name].action == "quantize"]
        self._numbers = {name: index for index, name in enumerate(quantized)}
        self._total = len(quantized)
        self.done: set[str] = set()
        self.biases = _corrected_biases(plan, recipe, calibrated=calibrated)
        self.configs: dict[str, dict[str, object]] = {}
        self.report = Report.for_plan(source.name, plan, recipe, calibrated=calibrated)
        self.report.bytes_in = sum(info.nbytes for info in source.tensors.values())
        self.report.device = devices
        self._clock = Clock(self.report.bytes_in)

    def start(self) -> set[str]:
        """Report the start, removed tensors and the layers of a killed run; returns the names of the tensors to read.

        Biases that may be corrected are read with their weight. A block of which some layers are missing is rounded again
        as a whole.
        """
        self._emit_start()
        for name in self.plan.names("remove"):
            self._report_tensor(self._kept(name, self.plan.decisions[name].reason, removed=True))
        self.done = self._restore_finished_layers()
        skipped = self.done | set(self.biases.values())
        if self.blocks:
            skipped -= self.blocks.restore(self.done, self.configs)
        return set(self.order) - skipped

    def layer_order(self, name: str) -> LayerOrder | None:
        """What is ordered of a weight; None where the tensor is copied."""
        decision = self.plan.decisions[name]
        if decision.action != "quantize":
            return None
        return LayerOrder(self.recipe.of(decision), self._calibrated, name in self.biases)

    @property
    def elapsed(self) -> float:
        """Time in s since the start."""
        return self._clock.elapsed

    def start_layer(self, name: str) -> None:
        """Report that a weight is being quantized."""
        if name not in self.done:
            shape = self._source.tensors[name].shape
            self._emit(LayerStarted(index=self._numbers[name], total=self._total, name=name, shape=shape))

    def copy(self, name: str, tensor: torch.Tensor) -> None:
        """Write a tensor as it is."""
        self._write_layer({name: tensor}, self._kept(name, self.plan.decisions[name].reason))

    def finish_layer(self, started: StartedLayer, result: LayerResult | NonFiniteWeightError) -> None:
        """Write a quantized layer, or an unquantized one with NaN or Inf, and report it."""
        if started.name in self.done:
            return
        bias_name = self.biases.get(started.name)
        if isinstance(result, NonFiniteWeightError):
            tensors = {name: started.tensors[name] for name in (started.name, bias_name) if name is not None}
            damaged = self._kept(started.name, NON_FINITE, planned=False)
            self._write_layer(tensors, damaged, *self._kept_bias(bias_name))
            return
        self.configs[base_name(started.name)] = result.config
        size = sum(tensor.nbytes for tensor in result.tensors.values())
        self._writer.wait_for_room(size)  # the time of a layer includes that of writing earlier ones
        finished = self._finished(started, result, bytes_out=size)
        self._write_layer(result.tensors, finished, *self._kept_bias(bias_name, corrected=result.bias_corrected))

    def wait(self) -> None:
        """Wait until all of the output that was handed over is written."""
        self._writer.wait()

    def abandon(self) -> None:
        """Write nothing more, after an error of this output."""
        self._writer.abandon()

    def report_failure(self, failure: DeviceFailure) -> None:
        """Report a device that failed; the report names each sentence once."""
        if (text := str(failure)) not in self.report.warnings:
            self.report.warnings.append(text)
        log.warning("%s", text)
        self._emit(DeviceFailed(device=failure.device, lost=failure.lost, text=text))

    def finish(self) -> None:
        """End the run after its last layer.

        Raises:
            NothingToQuantizeError: every layer contains NaN or Inf.
        """
        if not self.configs:
            raise NothingToQuantizeError(
                f"{self._source.name}: every layer to quantize {NON_FINITE}; the model is damaged."
            )
        if self.blocks:
            self.report.sequential = self.blocks.finish(self.report.layers)
        self.report.seconds = self._clock.elapsed

    def __enter__(self) -> "OutputRun":
        self._writer.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._writer.__exit__(*error)

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
                warnings=self.plan.warnings,
            )
        )

    def _planned_layers(self) -> Iterator[PlannedLayer]:
        for name in self.plan.output_names():
            shape, decision = self._source.tensors[name].shape, self.plan.decisions[name]
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

    def _finished(self, started: StartedLayer, result: LayerResult, *, bytes_out: int) -> LayerFinished:
        """The event of a quantized layer; advances the clock."""
        info = self._source.tensors[started.name]
        eta = self._clock.advance(info.nbytes)
        elapsed = self._clock.elapsed
        return LayerFinished(
            index=self._numbers[started.name],
            total=self._total,
            name=started.name,
            shape=info.shape,
            format=result.format,
            granularity=result.granularity,
            weight_error=result.weight_error,
            seconds=result.seconds if started.began is None else elapsed - started.began,
            bytes_in=info.nbytes,
            bytes_out=bytes_out,
            elapsed=elapsed,
            eta=eta,
            solver=result.solver,
            gain=result.gain,
            output_error=result.output_error,
            note="; ".join(filter(None, (result.note, *self._notes(started.name, result)))),
            convrot=result.convrot,
            scale=result.scale,
        )

    def _notes(self, name: str, result: LayerResult) -> Iterator[str]:
        """For the report: why a bank is not calibrated, and why the layer has another format than the recipe's."""
        bank = len(self._source.tensors[name].shape) == 3
        if bank and self._calibrated and result.output_error is None:
            yield UNSEEN
        decision = self.plan.decisions[name]
        if decision.fallback:
            yield f"in {result.format}: {decision.reason}"

    def _kept(self, name: str, reason: str, *, removed: bool = False, planned: bool = True) -> LayerKept:
        """The event of a tensor that is copied or removed; advances the clock."""
        info = self._source.tensors[name]
        self._clock.advance(info.nbytes)
        return LayerKept(name=name, shape=info.shape, reason=reason, removed=removed, planned=planned)

    def _kept_bias(self, name: str | None, *, corrected: bool = False) -> Sequence[LayerKept]:
        if name is None:
            return []
        return [self._kept(name, BIAS_CORRECTED if corrected else self.plan.decisions[name].reason)]

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


def _corrected_biases(plan: Plan, recipe: Recipe, *, calibrated: bool) -> dict[str, str]:
    """Weight → bias of the layers whose bias may be corrected."""
    correction = recipe.rounding.get("bias_correction")
    if correction == "none" or (correction == "auto" and not calibrated):
        return {}
    pairs = ((name, base_name(name) + ".bias") for name in plan.names("quantize"))
    return {name: bias for name, bias in pairs if bias in plan.decisions and plan.decisions[bias].action == "keep"}
