"""Follow a model block by block, with the state of all its calls, and choose among the results of each block."""

import contextlib
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from ..cancellation import CancelCheck
from ..events import BlockFinished, BlockStarted, Listener
from ..formats import Codec, QuantizedWeight
from ..formats.codec import Parts
from ..rounding import RoundingConfig
from .block import BlockRounding, PendingLayer
from .capture import InputSampler
from .linear import LinearFunction, QuantizedLinear
from .model import Block, ReplayedModel, UnfollowedModelError, find_blocks
from .streams import Stream, Streams

__all__ = ["ModelErrors", "ModelWalk"]

log = logging.getLogger(__name__)


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
        weights_only: also measure the quantized model with unquantized activations.
        seed: of the sampling of tokens.
        emit: receives :class:`~..events.BlockStarted` and :class:`~..events.BlockFinished`.
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
        seed: int,
        emit: Listener,
        check: CancelCheck,
    ):
        self._model, self._rounding, self._capability = model, rounding, capability
        self._weights_only, self._seed = weights_only, seed
        self._emit, self._check = emit, check
        self.unfollowed: str | None = None
        self.results: list[BlockFinished] = []
        self.blocks: list[Block] = []
        try:
            self.blocks = find_blocks(model, layers)
        except UnfollowedModelError as error:
            self._give_up(error)
        self._positions = {name: position for position, block in enumerate(self.blocks) for name in block.layers}
        self._outside: dict[str, QuantizedLinear] = {}
        self._streams: Streams | None = None
        self._opened = contextlib.ExitStack()
        self._next = 0

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
        widths = {name: pending.layer.weight.shape[1] for name, pending in layers.items()}
        rounding = BlockRounding(
            streams,
            InputSampler(streams, self._model.layers, widths, self._seed),
            layers,
            block.groups,
            weights=dict.fromkeys(range(len(self._model.validation)), 1.0),
            linears=self._outside,
            capability=capability,
            check=self._check,
            on_layer=lambda name: None,
        )
        candidates = {"calibrated": plain, "sequential": {**plain, **rounding.round()}}
        linears = {
            kind: {name: layers[name].linear(result, capability) for name, result in results.items()}
            for kind, results in candidates.items()
        }
        errors = {kind: self._block_error(streams, Stream.QUANTIZED, own) for kind, own in linears.items()}
        kept = min(errors, key=lambda kind: errors[kind])
        weights_only = None
        if Stream.WEIGHTS_ONLY in streams.carried:
            weights_only = self._block_error(streams, Stream.WEIGHTS_ONLY, linears[kept])
        finished = BlockFinished(
            index=index,
            total=len(self.blocks),
            name=block.name,
            kept=kept,
            error=errors[kept],
            calibrated_error=errors["calibrated"],
            weights_only_error=weights_only,
        )
        self.results.append(finished)
        self._emit(finished)
        self._advance(streams, linears[kept])
        return candidates[kept]

    def pass_block(self, layers: Mapping[str, tuple[Codec, Parts, tuple[int, ...]]]) -> None:
        """Let all calls go through the next block with layers that were quantized before: codec, tensors, shape."""
        streams = self._open_streams()
        if streams is not None:
            self._advance(streams, {name: self._linear(*layer) for name, layer in layers.items()})

    def model_errors(self) -> ModelErrors | None:
        """Errors of the model's output after the last block; None where the calls did not get there."""
        streams = self._streams
        if streams is None or self._next < len(self.blocks):
            return None
        exact = streams.results(Stream.ORIGINAL)
        errors = {}
        for stream in streams.carried[1:]:
            found, total = streams.results(stream), _ErrorSum()
            for index, outputs in exact.items():
                total.add(found[index], outputs)
            errors[stream] = total.value
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
            self._opened.close()
            self._streams = None

    def _give_up(self, error: UnfollowedModelError) -> None:
        self.unfollowed = str(error)
        log.warning("Sequential rounding stops, and layers are calibrated one by one: %s.", error)

    def _block_error(self, streams: Streams, stream: Stream, linears: Mapping[str, QuantizedLinear]) -> float:
        """Relative error of the block's outputs in the validation calls."""
        replaced: Mapping[str, LinearFunction] = {**self._outside, **linears}
        if stream is Stream.WEIGHTS_ONLY:
            replaced = _without_activations({**self._outside, **linears})
        total = _ErrorSum()
        for index in streams.validation:
            total.add(streams.run(stream, index, replaced), streams.run(Stream.ORIGINAL, index, {}))
        return total.value

    def _linear(self, codec: Codec, parts: Parts, shape: tuple[int, ...]) -> QuantizedLinear:
        parts = {suffix: part.to(self._model.device) for suffix, part in parts.items()}
        return QuantizedLinear(codec, parts, shape, self._capability)


def _without_activations(linears: Mapping[str, QuantizedLinear]) -> dict[str, LinearFunction]:
    return {name: linear.without_activations() for name, linear in linears.items()}


class _ErrorSum:
    """Relative error of several outputs over several calls: √ of the mean, over outputs, of Σ‖y − ŷ‖²/Σ‖y‖²."""

    def __init__(self):
        self._sums: dict[int, tuple[float, float]] = {}

    def add(self, found: Sequence[torch.Tensor], exact: Sequence[torch.Tensor]) -> None:
        """Add the outputs of one call."""
        for position, (a, b) in enumerate(zip(found, exact, strict=True)):
            if b.is_floating_point():
                error, total = self._sums.get(position, (0.0, 0.0))
                square = torch.linalg.vector_norm(a.float() - b.float(), dtype=torch.float64).square()
                energy = torch.linalg.vector_norm(b.float(), dtype=torch.float64).square()
                self._sums[position] = error + float(square), total + float(energy)

    @property
    def value(self) -> float:
        """The error of all outputs that were added."""
        shares = [error / total for error, total in self._sums.values() if total > 0]
        return math.sqrt(sum(shares) / len(shares)) if shares else 0.0
