"""The recorded calls as streams through the blocks of a model: the original model's, the quantized model's, and the quantized
model's with unquantized activations."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from enum import Enum
from typing import Any

import torch

from ..cancellation import CancelCheck
from .calls import SuspendedCall, replaced_forward, suspended_at
from .linear import LinearFunction
from .model import Block, ReplayedModel, UnfollowedModelError
from .parking import Parking, call_tensors

__all__ = ["Stream", "Streams"]


class Stream(Enum):
    """Which model a call runs through; only validation calls have the third."""

    ORIGINAL = "original"
    QUANTIZED = "quantized"
    WEIGHTS_ONLY = "weights only"


class Streams:
    """All calls at one block after the other; a context that ends them.

    Args:
        blocks: all blocks, in order.
        check: called for every call of a block; raise in it to cancel.
        weights_only: also carry the third stream.

    Attributes:
        validation: indices of the calls that only judge.
        calibration: indices of the others.
    """

    def __init__(self, model: ReplayedModel, blocks: list[Block], check: CancelCheck, *, weights_only: bool):
        self._model, self._blocks, self._check = model, blocks, check
        self.validation = [index for index, judges in enumerate(model.validation) if judges]
        self.calibration = [index for index, judges in enumerate(model.validation) if not judges]
        every = list(range(len(model.validation)))
        indices = {Stream.ORIGINAL: every, Stream.QUANTIZED: every}
        if weights_only:
            indices[Stream.WEIGHTS_ONLY] = self.validation
        self._calls = {
            stream: {index: SuspendedCall(lambda index=index: model.run(index)) for index in chosen}
            for stream, chosen in indices.items()
        }
        self._parking = Parking(model.root, model.device, model.device_bytes, model.ram_bytes, model.folder)
        self._forwards: dict[torch.nn.Module, Callable[..., Any]] = {}
        self._opened = contextlib.ExitStack()

    def __enter__(self) -> "Streams":
        suspended = suspended_at(block.module for block in self._blocks)
        self._forwards = self._opened.enter_context(suspended)
        return self

    def __exit__(self, *_) -> None:
        for calls in self._calls.values():
            for call in calls.values():
                if call.waiting is not None:
                    self._parking.release(call.waiting)
                call.close()
        self._opened.close()

    @property
    def carried(self) -> list[Stream]:
        """The streams of these calls."""
        return list(self._calls)

    def advance(self, stream: Stream, linears: Mapping[str, LinearFunction], position: int) -> None:
        """Run all calls of a stream up to the block at ``position``, or to their end, with these layers replaced.

        Raises:
            UnfollowedModelError: a call reaches another block.
        """
        expected = self._blocks[position].module if position < len(self._blocks) else None
        with self._replaced(linears):
            for call in self._calls[stream].values():
                self._check()
                if call.waiting is not None:
                    self._parking.release(call.waiting)
                reached = call.advance()
                found = None if reached is None else reached.block
                if found is not expected:
                    raise UnfollowedModelError(
                        f"a call of the model runs {self._name(found)} where the first one runs {self._name(expected)}"
                    )
                if reached is not None:
                    self._parking.park(reached)

    def run(self, stream: Stream, index: int, linears: Mapping[str, LinearFunction]) -> list[torch.Tensor]:
        """Outputs of the block at which a call waits, with these layers replaced; the call stays where it is."""
        self._check()
        waiting = self._calls[stream][index].waiting
        assert waiting is not None
        self._parking.restore(waiting)
        try:
            with self._replaced(linears):
                args, kwargs = _clone((waiting.args, waiting.kwargs))
                return list(call_tensors(self._forwards[waiting.block](*args, **kwargs)))
        finally:
            self._parking.leave(waiting)

    def results(self, stream: Stream) -> dict[int, list[torch.Tensor]]:
        """Outputs of the model in the validation calls that have ended."""
        calls = self._calls[stream]
        return {index: list(call_tensors(calls[index].result)) for index in self.validation}

    @contextlib.contextmanager
    def _replaced(self, linears: Mapping[str, LinearFunction]) -> Iterator[None]:
        with contextlib.ExitStack() as restorations:
            for name, linear in linears.items():
                restorations.enter_context(replaced_forward(self._model.layers[name], linear))
            yield

    def _name(self, module: torch.nn.Module | None) -> str:
        return next((block.name for block in self._blocks if block.module is module), "no block")


def _clone(values: Any) -> Any:
    """The same nested dicts, lists and tuples with copies of their tensors: blocks may change them in place."""
    if isinstance(values, torch.Tensor):
        return values.clone()
    if isinstance(values, dict):
        return {key: _clone(value) for key, value in values.items()}
    if isinstance(values, list | tuple):
        copies = [_clone(value) for value in values]
        return type(values)(*copies) if hasattr(values, "_fields") else type(values)(copies)
    return values
