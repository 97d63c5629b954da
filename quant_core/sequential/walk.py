"""Follow a model block by block, with the state of all its calls, and choose among the results of each block."""

import contextlib
import itertools
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from ..calibration.statistics import StepSensitivity
from ..cancellation import CancelCheck
from ..errors import CalibrationError
from ..events import BlockAdvanced, BlockFinished, BlockStarted, BlockStep, Listener
from ..formats import Codec, QuantizedWeight
from ..formats.codec import Parts
from ..rounding import RoundingConfig
from .block import BlockRounding, PendingLayer
from .capture import InputSampler
from .errors import ErrorSum
from .gradients import without_inference_tensors
from .learned import RoundedLayer
from .linear import LinearFunction, QuantizedLinear
from .model import Block, ReplayedModel, UnfollowedModelError, find_blocks
from .reconstruct import Reconstruction, reconstruct_block
from .streams import Stream, Streams

__all__ = ["ModelErrors", "ModelWalk", "interpolate"]

log = logging.getLogger(__name__)

_REPORTED_STEPS = 12  # gradient steps of a block that are reported: pages store every event


@dataclass(frozen=True)
class ModelErrors:
    """Relative errors of the model's output in the validation calls.

    Attributes:
        quantized: with activations as the card quantizes them.
        weights_only: with unquantized activations; None where the card quantizes none.
    """

    quantized: float
    weights_only: float | None


class ModelWalk:
    """Round the blocks of a model in order. A context: leaving it ends all calls and leaves the model as it was.

    Args:
        model: the model and its recorded calls.
        layers: names of the layers to quantize.
        rounding: "sequential" or "reconstructed" with its options.
        capability: compute capability that activations are quantized for; None for a card that multiplies the format.
        sensitivity: layer → its sensitivity at single steps, by which calls are weighted, or None.
        weights_only: also measure the quantized model with unquantized activations.
        seed: of the sampling of tokens.
        emit: receives :class:`~..events.BlockStarted`, :class:`~..events.BlockAdvanced` and :class:`~..events.BlockFinished`.
        check: called often; raise in it to cancel.

    Attributes:
        blocks: the blocks in order; empty where the model cannot be followed.
        unfollowed: why blocks keep their layer-wise result; None where the model can be followed.
        results: of the blocks that are done.
    """

    def __init__(
        self,
        model: ReplayedModel,
        layers: Sequence[str],
        *,
        rounding: RoundingConfig,
        capability: tuple[int, int] | None,
        weights_only: bool,
        sensitivity: Callable[[str], StepSensitivity | None] = lambda layer: None,
        seed: int,
        emit: Listener,
        check: CancelCheck,
    ):
        self._model, self._rounding, self._capability = model, rounding, capability
        self._weights_only, self._sensitivity, self._seed = weights_only, sensitivity, seed
        self._emit, self._check = emit, check
        self.unfollowed: str | None = None
        self.results: list[BlockFinished] = []
        self.blocks: list[Block] = []
        self._streams: Streams | None = None
        self._opened = contextlib.ExitStack()
        self._next = 0
        try:
            self.blocks = find_blocks(model, layers)
        except UnfollowedModelError as error:
            self._give_up(error)
        self._positions = {name: position for position, block in enumerate(self.blocks) for name in block.layers}
        self._outside: dict[str, QuantizedLinear] = {}

    def __enter__(self) -> "ModelWalk":
        return self

    def __exit__(self, *_) -> None:
        self._opened.close()
        self._streams = None

    def position(self, layer: str) -> int | None:
        """Index of the block of a layer; None for a layer outside of the blocks."""
        return self._positions.get(layer)

    def add_outside(self, layer: str, codec: Codec, parts: Parts, shape: tuple[int, ...]) -> None:
        """Let the quantized model run a layer outside of the blocks as quantized. To be called before the first block.

        Args:
            parts: tensors of the layer by the last part of their names.
        """
        if layer in self._model.layers and layer not in self._positions:
            self._outside[layer] = self._linear(codec, parts, shape)

    def round_block(self, layers: Mapping[str, PendingLayer]) -> dict[str, QuantizedWeight]:
        """The results of the layers of the next block: sequential where that is better, else layer-wise."""
        plain = {name: pending.plain for name, pending in layers.items()}
        streams = self._open_streams()
        if streams is None:
            return plain
        index, block, capability = self._next, self.blocks[self._next], self._capability
        self._emit(BlockStarted(index=index, total=len(self.blocks), name=block.name))
        numbers = itertools.count()
        widths = {name: pending.layer.weight.shape[1] for name, pending in layers.items()}
        rounding = BlockRounding(
            streams,
            InputSampler(streams, self._model.layers, widths, self._seed),
            layers,
            block.groups,
            weights=self._call_weights(block),
            linears=self._outside,
            capability=capability,
            check=self._check,
            on_layer=lambda: self._advanced("rounding", next(numbers), len(layers)),
        )
        try:
            rounded = rounding.round()
            sequential = {**plain, **{name: layer.quantized for name, layer in rounded.items()}}
            candidates, note = {"calibrated": plain, "sequential": sequential}, ""
            linears = {kind: self._linears_of(layers, results) for kind, results in candidates.items()}
            self._advanced("comparing", 0, 1)
            errors = self._compare(streams, linears)
        except CalibrationError as error:
            log.warning("The layers of %s are calibrated one by one: %s", block.name, error)
            self._advance(streams, self._linears_of(layers, plain))
            return plain
        kept = min(linears, key=lambda kind: errors[kind])
        if self._rounding.rounding == "reconstructed" and kept == "sequential":
            learned = self._reconstruct(streams, block, rounded)
            note = f"not reconstructed: {learned.refused}" if learned.refused else ""
            if learned.after < learned.before:
                kept = "reconstructed"
                candidates[kept] = {**sequential, **learned.quantized}
                linears[kept] = self._linears_of(layers, candidates[kept])
                errors |= self._compare(streams, {kept: linears[kept]})
        finished = BlockFinished(
            index=index,
            total=len(self.blocks),
            name=block.name,
            kept=kept,
            error=errors[kept],
            calibrated_error=errors["calibrated"],
            weights_only_error=self._weights_only_error(streams, linears[kept]),
            note=note,
        )
        self.results.append(finished)
        self._emit(finished)
        self._advance(streams, linears[kept])
        return candidates[kept]

    def _linears_of(
        self, layers: Mapping[str, PendingLayer], results: Mapping[str, QuantizedWeight]
    ) -> dict[str, QuantizedLinear]:
        return {name: layers[name].linear(result, self._capability) for name, result in results.items()}

    def _reconstruct(self, streams: Streams, block: Block, layers: Mapping[str, RoundedLayer]) -> Reconstruction:
        """Learn the roundings of a block from the sequential ones."""
        modules = [self._model.layers[name] for name in layers]
        return reconstruct_block(
            _BlockCalls(streams, block.module, modules),
            layers,
            self._rounding,
            capability=self._capability,
            weights=self._call_weights(block),
            linears=self._outside,
            seed=self._seed,
            check=self._check,
            on_step=self._report_gradient_step,
        )

    def _report_gradient_step(self, step: int, total: int) -> None:
        if step % -(-total // _REPORTED_STEPS) == 0:
            self._advanced("reconstructing", step, total)

    def _advanced(self, step: BlockStep, done: int, total: int) -> None:
        """Report a step of the current block."""
        index, block = self._next, self.blocks[self._next]
        self._emit(BlockAdvanced(index, len(self.blocks), block.name, step, done, total))

    def pass_block(self, layers: Mapping[str, tuple[Codec, Parts, tuple[int, ...]]]) -> None:
        """Let all calls go through the next block with layers that were quantized before: codec, tensors, shape."""
        streams = self._open_streams()
        if streams is not None:
            self._advanced("running", 0, 1)
            self._advance(streams, {name: self._linear(*layer) for name, layer in layers.items()})

    def model_errors(self) -> ModelErrors | None:
        """Errors of the model's output after the last block; None where the calls did not get there, or it contains NaN or Inf."""
        streams = self._streams
        if streams is None or self._next < len(self.blocks):
            return None
        exact = streams.results(Stream.ORIGINAL)
        errors = {}
        for stream in streams.carried[1:]:
            found, total = streams.results(stream), ErrorSum()
            for index, outputs in exact.items():
                total.add(found[index], outputs, 1.0)
            errors[stream] = total.value
        if not all(map(math.isfinite, errors.values())):
            return None
        return ModelErrors(errors[Stream.QUANTIZED], errors.get(Stream.WEIGHTS_ONLY))

    def _open_streams(self) -> Streams | None:
        """The streams, at the next block; None where the model cannot be followed."""
        if self._streams is None and self.unfollowed is None:
            streams = Streams(self._model, self.blocks, self._check, weights_only=self._weights_only)
            self._streams = self._opened.enter_context(streams)
            self._next = -1
            self._advance(streams, {})
        return self._streams

    def _advance(self, streams: Streams, linears: Mapping[str, QuantizedLinear]) -> None:
        """Run all calls to the next block, with these layers in the current one."""
        self._next += 1
        quantized = {**self._outside, **linears}
        replaced: dict[Stream, Mapping[str, LinearFunction]] = {
            Stream.ORIGINAL: {},
            Stream.QUANTIZED: quantized,
            Stream.WEIGHTS_ONLY: _without_activations(quantized),
        }
        try:
            for stream in streams.carried:
                streams.advance(stream, replaced[stream], self._next)
        except UnfollowedModelError as error:
            self._give_up(error)

    def _give_up(self, error: UnfollowedModelError) -> None:
        self.unfollowed = str(error)
        log.warning("Sequential rounding stops, and layers are calibrated one by one: %s.", error)
        self._opened.close()
        self._streams = None

    def _compare(self, streams: Streams, linears: Mapping[str, Mapping[str, QuantizedLinear]]) -> dict[str, float]:
        """Relative errors of the block's outputs in the validation calls, for several roundings of its layers.

        Raises:
            CalibrationError: the outputs contain NaN or Inf.
        """
        totals = {kind: ErrorSum() for kind in linears}
        weights = self._call_weights(self.blocks[self._next])
        for index in streams.validation:
            exact = streams.run(Stream.ORIGINAL, index, {})
            for kind, total in totals.items():
                found = streams.run(Stream.QUANTIZED, index, {**self._outside, **linears[kind]})
                total.add(found, exact, weights[index])
        errors = {kind: total.value for kind, total in totals.items()}
        if not all(map(math.isfinite, errors.values())):
            raise CalibrationError("its outputs contain NaN or Inf.")
        return errors

    def _weights_only_error(self, streams: Streams, linears: Mapping[str, QuantizedLinear]) -> float | None:
        """The error of the block with unquantized activations; None where the card quantizes none."""
        if Stream.WEIGHTS_ONLY not in streams.carried:
            return None
        total, replaced = ErrorSum(), _without_activations({**self._outside, **linears})
        for index in streams.validation:
            total.add(streams.run(Stream.WEIGHTS_ONLY, index, replaced), streams.run(Stream.ORIGINAL, index, {}), 1.0)
        return total.value

    def _call_weights(self, block: Block) -> dict[int, float]:
        """Weight of each call in the errors of a block, by what they do to the model's output; their mean is 1."""
        measured = [found for name in block.layers if (found := self._sensitivity(name))]
        weights = [sum(interpolate(found, position) for found in measured) for position in self._model.positions]
        mean = sum(weights) / len(weights)
        return {index: weight / mean if mean > 0 else 1.0 for index, weight in enumerate(weights)}

    def _linear(self, codec: Codec, parts: Parts, shape: tuple[int, ...]) -> QuantizedLinear:
        parts = {suffix: part.to(self._model.device) for suffix, part in parts.items()}
        return QuantizedLinear(codec, parts, shape, self._capability)


def interpolate(points: StepSensitivity, position: float) -> float:
    """The value at a position between (position, value) points in ascending order; beyond them that of the nearest."""
    before, after = points[0], points[-1]
    for point in points:
        if point[0] <= position:
            before = point
        else:
            after = point
            break
    if after[0] <= before[0] or position <= before[0]:
        return before[1]
    share = min(1.0, (position - before[0]) / (after[0] - before[0]))
    return before[1] + share * (after[1] - before[1])


def _without_activations(linears: Mapping[str, QuantizedLinear]) -> dict[str, LinearFunction]:
    return {name: linear.without_activations() for name, linear in linears.items()}


@dataclass(frozen=True)
class _BlockCalls:
    """Calls of a block for :func:`~.reconstruct.reconstruct_block`."""

    streams: Streams
    block: torch.nn.Module
    layers: Sequence[torch.nn.Module]

    @property
    def calibration(self) -> Sequence[int]:
        return self.streams.calibration

    @property
    def validation(self) -> Sequence[int]:
        return self.streams.validation

    def run(self, call: int, linears: Mapping[str, LinearFunction]) -> list[torch.Tensor]:
        with without_inference_tensors(self.block, self.layers):
            return self.streams.run(Stream.QUANTIZED, call, linears)

    def target(self, call: int) -> list[torch.Tensor]:
        with torch.no_grad(), without_inference_tensors(self.block):
            return self.streams.run(Stream.ORIGINAL, call, {})
