"""Collect statistics of the input activations of linear layers with forward pre-hooks while a model runs."""

import contextlib
import functools
import math
import os
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..cancellation import CancelCheck
from ..errors import CalibrationError, OutputError
from ..file_system import remove_file
from .accumulate import (
    HessianAccumulator,
    LowRankHessianAccumulator,
    PackedHessianAccumulator,
    PairedHessianAccumulator,
    StatisticsAccumulator,
)
from .background import BackgroundWorker
from .file import CalibrationFile, write_calibration
from .hessian import PackedHessian, TriangularHessian, pack_triangle
from .panels import packed_size
from .statistics import LayerStatistics

__all__ = ["ROTATION", "Collector"]

ROTATION = 8  # a Hessian in a file is updated in every eighth call, with eight times the tokens
_MIN_RANK = 16  # of a low-rank Hessian; fewer random signs do not resolve its leading directions
_VALIDATION_SHARE = 0.25  # of the tokens, where no complete run is used for validation
_VALIDATION_BYTES = 1 << 30  # for the validation activations of all layers, counted in float32
_WORKERS = 2  # background threads: one copies while the GPU computes for the other
_PENDING_BYTES = 2048  # per channel of a Hessian on the device: a batch of 1,024 activations in 16 bits
_ZEROS = memoryview(bytes(1 << 22))


class Collector:
    """Collect statistics of the input activations of ``layers`` while a model runs.

    Each call of the model contributes up to ``tokens`` randomly sampled tokens per layer. Layers that receive the same
    tensor share one set of statistics. The hooks do not modify the activations and are removed when :meth:`watching`
    ends, also after an exception.

    Memory: Hessians are float32 on ``device``, each with a buffer of up to 1,024 pending activations, until
    ``device_bytes`` are used. Further Hessians are float16 in memory-mapped files in ``folder``: in² bytes each, plus the
    activations for four of them and blocks of two of them on the device, and 0.2 GB of pinned host memory. A low-rank
    Hessian takes 8·in²/``rank`` bytes on the device. Validation activations take at most 1 GB.

    Args:
        layers: name (of the weight, without ``.weight``) → linear layer, or ComfyUI's ``MoEExperts``, a bank of experts
            (experts, out, in) that is called by its method ``expert_linear``; all its experts share statistics.
        folder: existing folder for the files.
        device: device of the model.
        device_bytes: device memory for Hessians, in bytes.
        rank: None for complete Hessians; else a divisor: the leading in/``rank`` directions, at least 16, and the
            diagonal are stored.
        quantized_activations: also collect the complete Hessian of the activations next to their INT8 quantization,
            see :class:`~.hessian.PairedHessian`; four times the memory.
        tokens: number of tokens sampled per call.
        validation_size: number of validation activations stored per layer.
        seed: of the sampling.
        earlier: calibration of the same layers to continue.
        hessian_bits: 8 to save complete Hessians as 8-bit factors, see :class:`~.hessian.TriangularHessian`, 16 for float16
            correlations. Those of quantized activations are always saved in 16 bits.

    Attributes:
        sensitivities: layer → :attr:`~.statistics.LayerStatistics.sensitivity`, where measured; saved with the
            statistics. ``step_sensitivities``: those at single steps, likewise.

    Raises:
        CalibrationError: ``earlier`` does not fit ``layers``.
    """

    def __init__(
        self,
        layers: Mapping[str, Any],
        folder: str | os.PathLike,
        *,
        device: torch.device,
        device_bytes: int,
        rank: int | None = None,
        quantized_activations: bool = False,
        tokens: int = 256,
        validation_size: int = 512,
        seed: int = 0,
        earlier: CalibrationFile | None = None,
        hessian_bits: int = 8,
    ):
        self._layers, self._folder, self._device = dict(layers), Path(folder), device
        self._shapes = {name: tuple(layer.weight.shape[-2:]) for name, layer in self._layers.items()}
        self._budget = self._free_bytes = max(device_bytes, 0)
        self._rank, self._tokens, self._seed = rank, tokens, seed
        self._earlier, self._paired, self._hessian_bits = earlier, quantized_activations, hessian_bits
        channels = sum(self._widths())
        self._validation_size = max(16, min(validation_size, _VALIDATION_BYTES // (4 * max(channels, 1))))
        self._owners: dict[str, str] = {}  # layer → layer whose statistics it shares; itself, if none
        self._accumulators: dict[str, StatisticsAccumulator] = {}
        self._schedules: dict[str, tuple[int, int]] = {}  # owner → (period, phase) of the calls that it samples
        self._files: list[Path] = []
        self._workers: list[BackgroundWorker] = []
        self._recent: dict[int, tuple[weakref.ref, str]] = {}  # id of a tensor of this call → (tensor, owner)
        self._samples: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = {}
        self._slots: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = {}
        self._calls = 0
        self._validation: bool | None = None
        self.sensitivities = dict(earlier.sensitivities) if earlier is not None else {}
        self.step_sensitivities = dict(earlier.step_sensitivities) if earlier is not None else {}
        if earlier is not None:
            earlier.check(self._shapes)

    def _widths(self) -> list[int]:
        return [shape[1] for shape in self._shapes.values()]

    @property
    def disk_bytes(self) -> int:
        """Upper bound of the size of the files, reached if no layers share activations."""
        if self._rank or sum(map(self._hessian_bytes, self._widths())) <= self._budget:
            return 0
        return 2 * sum(map(self._packed_size, self._widths()))

    @property
    def device_bytes(self) -> int:
        """Upper bound of the device memory of Hessians and pending activations."""
        if self._rank:
            return sum(8 * width * max(_MIN_RANK, width // self._rank) for width in self._widths())
        return min(sum(map(self._hessian_bytes, self._widths())), self._budget)

    @property
    def captured_energy(self) -> float:
        """Least fraction of tr(H), over all layers, that the stored directions cover; 1 for complete Hessians."""
        return min((found.hessian.captured_energy for found in self._accumulators.values()), default=1.0)

    @property
    def calls(self) -> int:
        """Number of calls of the model."""
        return self._calls

    @property
    def distinct_activations(self) -> int:
        """Number of distinct input activations, each shared by one or more layers."""
        return len(self._accumulators)

    @property
    def tokens(self) -> int:
        """Least number of tokens in a Hessian."""
        return min((found.tokens for found in self._accumulators.values() if found.tokens), default=0)

    @contextlib.contextmanager
    def watching(self, model: torch.nn.Module, validation: bool | None = None) -> Iterator[None]:
        """Collect statistics while ``model``, which contains the layers, is called in this context.

        ``validation``: True to use the activations for validation only, False for calibration only, None to use a random
        quarter of the tokens for validation.
        """
        self._validation = validation
        try:
            with contextlib.ExitStack() as removals:
                removals.callback(model.register_forward_pre_hook(self._start_call).remove)
                for name, layer in self._layers.items():
                    removals.callback(_watch_calls(layer, self._make_hook(name)))
                yield
        finally:
            self._recent.clear()
            self._flush()

    @torch.inference_mode()
    def _flush(self) -> None:
        """Add all pending activations and wait for the background workers."""
        for accumulator in self._accumulators.values():
            accumulator.flush()
        for worker in self._workers:
            worker.wait()

    def _start_call(self, *_) -> None:
        self._calls += 1
        self._recent.clear()
        self._samples.clear()
        self._slots.clear()

    def _make_hook(self, name: str):
        def hook(layer: torch.nn.Module, args: tuple) -> None:
            if args and isinstance(args[0], torch.Tensor) and args[0].numel():
                self._record(name, args[0])

        return hook

    @torch.inference_mode()
    def _record(self, name: str, x: torch.Tensor) -> None:
        reference, owner = self._recent.setdefault(id(x), (weakref.ref(x), name))
        if reference() is not x:  # a new tensor with the id of a deleted one
            self._recent[id(x)], owner = (weakref.ref(x), name), name
        if name not in self._owners:
            self._owners[name] = owner
        elif self._owners[name] not in (name, owner):  # no longer receives the tensor of its owner
            self._owners[name] = name
        if self._owners[name] != name:
            return  # recorded by the owner
        if name not in self._accumulators:
            self._accumulators[name] = self._make_accumulator(name, x)
        accumulator, activations = self._accumulators[name], x.detach().flatten(0, -2)
        accumulator.update_amax(activations)
        period, phase = self._schedules[name]
        empty = not (accumulator.validation_tokens if self._validation else accumulator.tokens)
        if (self._calls + phase) % period and not empty:
            return
        calibration, validation = self._sample_tokens(len(activations), period)
        if self._validation is not True:
            accumulator.add(activations, calibration)
        if self._validation is not False:
            slots = self._sample_reservoir(validation, accumulator.validation_tokens)
            accumulator.add_validation(activations, *slots, len(validation))

    def _sample_tokens(self, count: int, period: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Sample token indices for calibration (on the device) and validation (on the CPU); the same for all layers of a call."""
        if (count, period) not in self._samples:
            generator = self._make_generator(count, 0)
            order = torch.randperm(count, generator=generator)[: self._tokens * period]
            if self._validation is None:
                selected = torch.rand(len(order), generator=generator) < _VALIDATION_SHARE
                parts = order[~selected], order[selected]
            else:
                parts = order, order
            calibration, validation = (part.sort().values for part in parts)
            self._samples[count, period] = self._to_device(calibration), validation
        return self._samples[count, period]

    def _sample_reservoir(self, validation: torch.Tensor, seen: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Choose validation tokens to store and their slots, on the device, by reservoir sampling after ``seen`` tokens."""
        key = id(validation), seen
        if key not in self._slots:
            size, count = self._validation_size, len(validation)
            counts = torch.arange(count) + seen
            drawn = torch.rand(count, generator=self._make_generator(count, seen + 1), dtype=torch.float64)
            slots = torch.where(counts < size, counts, (drawn * (counts + 1)).long()).tolist()
            last = {slot: token for token, slot in enumerate(slots) if slot < size}  # the last token of each slot
            tokens = validation[torch.tensor(list(last.values()), dtype=torch.long)]
            chosen = self._to_device(torch.stack([tokens, torch.tensor(list(last), dtype=torch.long)]))
            self._slots[key] = chosen[0], chosen[1]
        return self._slots[key]

    def _to_device(self, indices: torch.Tensor) -> torch.Tensor:
        """Copy ``indices`` to the device without synchronization."""
        if self._device.type == "cuda":
            indices = indices.pin_memory()
        return indices.to(self._device, non_blocking=True)

    def _make_generator(self, *numbers: int) -> torch.Generator:
        mixed = hash((self._seed, self._calls, *numbers))  # hashes of integers are the same in every process
        return torch.Generator().manual_seed(mixed & (2**63 - 1))

    def _make_accumulator(self, name: str, x: torch.Tensor) -> StatisticsAccumulator:
        channels = x.shape[-1]
        hessian, pending_bytes, worker = self._make_hessian(name, channels)
        validation, pending = (
            torch.zeros(size, channels, dtype=x.dtype, device=self._device)
            for size in (self._validation_size, pending_bytes // x.element_size())
        )
        accumulator = StatisticsAccumulator(hessian, channels, validation, pending, self._device, worker)
        if self._earlier is not None and (statistics := self._earlier.layer_statistics(name)) is not None:
            accumulator.resume(statistics, *self._earlier.tokens(name))
        return accumulator

    def _packed_size(self, channels: int) -> int:
        """Number of elements of a complete Hessian."""
        return packed_size(2 * channels if self._paired else channels)

    def _hessian_bytes(self, channels: int) -> int:
        """Device memory of a complete Hessian and its pending activations."""
        return 4 * self._packed_size(channels) + _PENDING_BYTES * channels

    def _make_hessian(self, name: str, channels: int) -> tuple[HessianAccumulator, int, BackgroundWorker | None]:
        """Return an accumulator of H, the bytes per channel of its pending activations, and its background worker."""
        self._schedules[name] = 1, 0
        if self._rank:
            rank = max(_MIN_RANK, channels // self._rank)
            return LowRankHessianAccumulator(channels, rank, self._device), 0, None
        size, make = self._packed_size(channels), PairedHessianAccumulator if self._paired else PackedHessianAccumulator
        if self._hessian_bytes(channels) <= self._free_bytes:
            self._free_bytes -= self._hessian_bytes(channels)
            return make(channels, torch.zeros(size, device=self._device), self._device), _PENDING_BYTES, None
        number = len(self._files)
        self._schedules[name] = ROTATION, number
        worker = None
        if self._device.type == "cuda":
            if not self._workers:
                self._workers = [BackgroundWorker(self._device) for _ in range(_WORKERS)]
            worker = self._workers[
                number // ROTATION % _WORKERS
            ]  # distributes the updates of one call over all workers
        return make(channels, self._map_file(size), self._device), 0, worker

    def _map_file(self, size: int) -> torch.Tensor:
        """Create a memory-mapped file of ``size`` float16 zeros."""
        path = self._folder / f"hessian_{len(self._files):05}"
        try:
            with open(path, "xb") as file:
                self._files.append(path)
                # Written out: with a sparse file, a full disk would end the process with SIGBUS.
                for start in range(0, 2 * size, len(_ZEROS)):
                    file.write(_ZEROS[: 2 * size - start])
        except OSError as error:
            raise OutputError(
                f"Hessians cannot be written to {self._folder}: {error.strerror or error}; free some space, or use a "
                "lower rank (keep: compact)."
            ) from error
        return torch.from_file(str(path), shared=True, size=size, dtype=torch.float16)

    def save(self, path: str | os.PathLike, provenance: Mapping[str, object], check: CancelCheck = lambda: None) -> int:
        """Write all statistics as :class:`~.file.CalibrationFile` reads them; returns the size of the file in bytes.

        ``provenance``: description of the calibration data, as JSON values. ``check``: called often; raise in it to cancel.

        Raises:
            CalibrationError: no linear layer was called, or activations were not finite.
        """
        self._flush()
        used = {name: accumulator for name, accumulator in self._accumulators.items() if accumulator.tokens}
        if not used:
            raise CalibrationError("No linear layer was called; call the model in Collector.watching before saving.")
        for name, accumulator in used.items():
            if not math.isfinite(float(accumulator.hessian.sum_of_squares.sum())):
                raise CalibrationError(
                    f"The input activations of {name} contain NaN or Inf; check the output of the unquantized model."
                )
        owners = {layer: owner for layer, owner in self._owners.items() if owner in used}
        shapes = {layer: self._shapes[layer] for layer in owners}
        tokens = {name: (accumulator.tokens, accumulator.validation_tokens) for name, accumulator in used.items()}
        statistics = _Results(used, self._device, self._hessian_bits)
        sensitivities = self.sensitivities, check, self.step_sensitivities
        return write_calibration(path, statistics, owners, shapes, tokens, provenance, *sensitivities)

    def close(self) -> None:
        """Release all memory and remove the files."""
        for worker in self._workers:
            worker.close()
        self._workers.clear()
        self._accumulators.clear()
        for path in self._files:
            remove_file(path)  # on Windows not while a Hessian maps it; its folder is removed later
        self._files.clear()

    def __enter__(self) -> "Collector":
        return self

    def __exit__(self, *_) -> None:
        self.close()


def _watch_calls(layer: torch.nn.Module, hook: Callable[[torch.nn.Module, tuple], None]) -> Callable[[], None]:
    """Call ``hook`` before each call of a layer, or of an expert of a bank; returns what ends that."""
    run = getattr(layer, "expert_linear", None)
    if run is None:
        return layer.register_forward_pre_hook(hook).remove

    def expert_linear(x: torch.Tensor, expert: int) -> torch.Tensor:
        hook(layer, (x,))
        return run(x, expert)

    vars(layer)["expert_linear"] = expert_linear  # hides the method of the class
    return functools.partial(vars(layer).pop, "expert_linear")


class _Results(Mapping[str, LayerStatistics]):
    """Owner → the statistics of its accumulator, computed when they are looked up."""

    def __init__(self, accumulators: Mapping[str, StatisticsAccumulator], device: torch.device, hessian_bits: int):
        self._accumulators, self._device, self._bits = accumulators, device, hessian_bits

    @torch.inference_mode()
    def __getitem__(self, owner: str) -> LayerStatistics:
        statistics = self._accumulators[owner].result()
        if self._bits != 8 or not isinstance(statistics.hessian, PackedHessian):
            return statistics
        try:
            return replace(statistics, hessian=self._pack(statistics.hessian))
        except CalibrationError:  # the noise of its 16 bits has made it indefinite; dampening will cover that
            return statistics

    def _pack(self, hessian: PackedHessian) -> TriangularHessian:
        """Round H to 8 bits on the device, or on the CPU if the device has too little memory."""
        try:
            return pack_triangle(hessian, self._device)
        except torch.OutOfMemoryError:
            if self._device.type == "cpu":
                raise
        torch.cuda.empty_cache()
        return pack_triangle(hessian, torch.device("cpu"))

    def __iter__(self) -> Iterator[str]:
        return iter(self._accumulators)

    def __len__(self) -> int:
        return len(self._accumulators)
