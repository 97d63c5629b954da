"""The quantization loop: every tensor of the source, read once, to all outputs of a run, layer by layer."""

import functools
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, closing
from dataclasses import dataclass, field

import torch

from ..calibration import Calibration, LayerStatistics
from ..cancellation import CancelCheck, wait_for_any
from ..errors import NonFiniteWeightError, OutputError
from ..recipes import Plan
from ..sources import Source
from ..sources.source import CPU, is_computed
from ..workers import TaskPool
from .blocks import StartedLayer, base_name
from .io_threads import compute_ahead, read_ahead
from .layer_task import LayerOrder, LayerResult, LayerTask, move_statistics, quantize_ordered
from .output_run import OutputRun

__all__ = ["QuantizationLoop", "read_device", "weight_device"]

_READERS = 4  # threads that read weights for other processes
_MOST_PENDING = 1 << 32  # bytes of tensors that are read and not yet written; one may be larger


@dataclass
class _Copy:
    """A tensor that is read, and copied to outputs when it is its turn."""

    name: str
    tensor: torch.Tensor
    outputs: Sequence[OutputRun]
    future: None = None

    @property
    def size(self) -> int:
        return self.tensor.nbytes

    def write(self, number: int) -> None:
        """Write it to the output of this number."""
        self.outputs[number].copy(self.name, self.tensor)


@dataclass
class _Quantization:
    """A layer that is being quantized, and written to outputs when it is its turn.

    Attributes:
        started: its name and source tensors.
        size: bytes of the source tensors, and of a Hessian that is sent with them.
        outputs: those that ordered it.
        future: of their results.
    """

    started: StartedLayer
    size: int
    outputs: Sequence[OutputRun]
    future: "Future[list[LayerResult | NonFiniteWeightError]]"

    def write(self, number: int) -> None:
        """Write it to the output of this number."""
        self.outputs[number].finish_layer(self.started, self.future.result()[number])


@dataclass
class QuantizationLoop:
    """Reads tensors in order, lets the devices of a pool quantize them, and writes the results in the same order.

    The next tensors are read and the previous layers are written by threads. Several outputs share each read, the statistics
    of a layer and what is computed from them; an output that is rounded block by block is the only one. An output that cannot
    be written does not stop the others.

    Attributes:
        source: where tensors are read.
        outputs: the outputs.
        calibration: statistics of input activations; layers without are rounded as if uncalibrated.
        pool: devices that quantize.
        device: where weights are read to, see :func:`weight_device`.
        check: called often; raises to cancel.
        failed: outputs that could not be written, and why.
    """

    source: Source
    outputs: Sequence[OutputRun]
    calibration: Calibration | None
    pool: TaskPool
    device: torch.device
    check: CancelCheck
    failed: dict[OutputRun, OutputError] = field(default_factory=dict)
    _pending: "deque[_Copy | _Quantization]" = field(default_factory=deque)
    _needed: Mapping[OutputRun, set[str]] = field(default_factory=dict)

    def execute(self) -> None:
        """Quantize, copy or remove every tensor of all outputs. An error leaves nothing to wait for.

        Raises:
            OutputError: every output has failed, the last one with this error.
        """
        self._needed = {output: output.start() for output in self.outputs}
        reads = list(self._merge_reads())
        with ExitStack() as opened:
            for output in self.outputs:
                opened.enter_context(output)
            statistics = opened.enter_context(closing(self._read_statistics(reads)))
            for name, tensor in read_ahead(self.source, reads, self.check, threads=self._reading_threads):
                self.check()
                self._begin(name, tensor, statistics)
                del tensor  # its memory is free before the thread reads the next tensor
                self._write_finished(self.pool.capacity)
            self._write_finished(1)
            for output in self.outputs:
                self._write(output, output.wait)

    @property
    def _reading_threads(self) -> int:
        """Fresh memory of a CPU is filled more slowly than several devices need weights; those of a GPU have buffers."""
        return 1 if self.pool.capacity == 1 or is_computed(self.source) else _READERS

    def _merge_reads(self) -> Iterator[tuple[str, torch.device]]:
        """(name, device) of the tensors to read."""
        order = self.outputs[0].order if len(self.outputs) == 1 else self.source.tensors
        plans = [output.plan for output in self.outputs]
        for name in order:
            if any(name in names for names in self._needed.values()):
                yield name, read_device(self.source, plans, name, self.device)

    def _read_statistics(self, reads: Sequence[tuple[str, torch.device]]) -> Generator[LayerStatistics, None, None]:
        """Yield the statistics of each weight to quantize in turn, read ahead by a thread."""
        calibration = self.calibration
        if calibration is None:
            return

        def read(name: str) -> LayerStatistics:
            statistics = calibration.layer_statistics(base_name(name)) or LayerStatistics()
            return move_statistics(statistics, self.pool.device)

        weights = [name for name, _ in reads if _are_calibrated(self._orders(name))]
        yield from compute_ahead(read, weights, self.check)

    def _orders(self, name: str) -> dict[OutputRun, LayerOrder]:
        """What the outputs that need a tensor order of it, without those that copy it."""
        orders = {output: output.layer_order(name) for output, names in self._needed.items() if name in names}
        return {output: order for output, order in orders.items() if order is not None}

    def _begin(self, name: str, tensor: torch.Tensor, statistics: Iterator[LayerStatistics]) -> None:
        """Let a tensor be quantized for the outputs that order it; the others copy it when it is its turn."""
        orders = self._orders(name)
        copies = [output for output, names in self._needed.items() if name in names and output not in orders]
        if copies:
            exact = tensor.device == CPU or not is_computed(self.source)  # else an output alone would read other bytes
            self._pending.append(_Copy(name, tensor if exact else self.source.read(name), copies))
        if orders:
            self._begin_layer(name, tensor, orders, next(statistics) if _are_calibrated(orders) else None)

    def _begin_layer(
        self, name: str, weight: torch.Tensor, orders: Mapping[OutputRun, LayerOrder], known: LayerStatistics | None
    ) -> None:
        alone = self.pool.capacity == 1 and len(self.outputs) == 1
        began = self.outputs[0].elapsed if alone else None
        for output in orders:
            if output not in self.failed:
                output.start_layer(name)
        bias = next((output.biases[name] for output in orders if name in output.biases), None)
        tensors = {name: weight.to(self.pool.device)}
        if bias is not None:
            tensors[bias] = self.source.read(bias)
        started = StartedLayer(name, tensors, bias, began)
        task = LayerTask(base_name(name), tensors[name], started.bias, known, list(orders.values()))
        if self.outputs[0].blocks:
            self._quantize_in_blocks(self.outputs[0], started, task)
            return
        sent = 0 if known is None or self.pool.capacity == 1 else known.hessian_bytes
        size = sum(each.nbytes for each in tensors.values()) + sent
        self._pending.append(_Quantization(started, size, list(orders), self.pool.submit(task, size)))

    def _quantize_in_blocks(self, output: OutputRun, started: StartedLayer, task: LayerTask) -> None:
        """Quantize a layer here, and write the layers that are finished with it: all of a block, or none."""
        assert output.blocks is not None
        order = task.orders[0]
        layer, finished = None, []
        try:
            layer, quantized = quantize_ordered(task, order, self.device, self.check)
            finished = [(started, quantized)]
        except NonFiniteWeightError as error:
            output.finish_layer(started, error)
        for each, quantized in output.blocks.add(started, layer, finished):
            bias = each.bias if each.name in output.biases else None
            output.finish_layer(each, LayerResult.of(base_name(each.name), quantized, bias))

    def _write_finished(self, most: int) -> None:
        """Write what is finished, in order, and wait while ``most`` or more layers are unfinished, or too many bytes wait."""
        while True:
            self.check()
            while self._pending and (self._pending[0].future is None or self._pending[0].future.done()):
                finished = self._pending.popleft()
                for number, output in enumerate(finished.outputs):
                    self._write(output, functools.partial(finished.write, number))
                self._report_failures()
            futures = [each.future for each in self._pending if each.future is not None and not each.future.done()]
            waiting = sum(each.size for each in self._pending)
            if len(futures) < most and waiting <= _MOST_PENDING:
                return
            wait_for_any(futures, self.check)
            self._report_failures()

    def _write(self, output: OutputRun, write: Callable[[], None]) -> None:
        """Let an output write, unless it has failed; after its error the others continue without it."""
        if output in self.failed:
            return
        try:
            write()
        except OutputError as error:
            self.failed[output] = error
            output.abandon()
            if len(self.failed) == len(self.outputs):
                raise

    def _report_failures(self) -> None:
        for failure in self.pool.take_failures():
            for output in self.outputs:
                output.report_failure(failure)


def _are_calibrated(orders: Mapping[OutputRun, LayerOrder]) -> bool:
    return any(order.calibrated for order in orders.values())


def weight_device(source: Source, pool: TaskPool, device: torch.device) -> torch.device:
    """Where weights are read to: ``device``, the first of a run; the CPU if they are sent elsewhere and have the same bytes there."""
    return device if is_computed(source) else pool.device


def read_device(source: Source, plans: Sequence[Plan], name: str, device: torch.device) -> torch.device:
    """The device that a source tensor is read to: ``device`` for layers that a plan quantizes, else the CPU.

    Banks of experts are read to the CPU; an expert takes a small part of their memory.
    """
    matrix = len(source.tensors[name].shape) == 2
    quantized = any(plan.decisions[name].action == "quantize" for plan in plans)
    return device if matrix and quantized else CPU
