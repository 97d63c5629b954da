"""Sampled inputs of the layers of a block, in both models."""

import contextlib
from collections.abc import Callable, Mapping, Sequence

import torch

from .linear import LinearFunction
from .streams import Stream, Streams

__all__ = ["InputSampler"]

_ROWS_PER_CHANNEL = 4  # sampled tokens of a layer, over all calibration calls
_LEAST_ROWS = 1 << 15
_VALIDATION_ROWS = 1024  # over all validation calls


class _Reached(BaseException):
    """Ends the run of a block whose remaining layers are not needed."""


class InputSampler:
    """Draw the same tokens of a layer's inputs in both models.

    Args:
        widths: name of a layer → its input channels.
        seed: of the drawing.
    """

    def __init__(self, streams: Streams, layers: Mapping[str, torch.nn.Module], widths: Mapping[str, int], seed: int):
        self._streams, self._layers, self._widths, self._seed = streams, layers, widths, seed

    def forward(self, name: str) -> LinearFunction:
        """The forward of a layer in the original model."""
        return self._layers[name].forward

    def sample(
        self,
        stream: Stream,
        index: int,
        names: Sequence[str],
        linears: Mapping[str, LinearFunction],
    ) -> dict[str, torch.Tensor]:
        """Run the block at which a call waits until layers have been called; returns their inputs (tokens, in) in their first calls.

        Args:
            linears: layers that are replaced.
        """
        found: dict[str, torch.Tensor] = {}

        def probe(name: str) -> LinearFunction:
            forward: Callable[[torch.Tensor], torch.Tensor] = linears.get(name, self.forward(name))

            def function(x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
                if name not in found:
                    rows = x.detach().flatten(0, -2)
                    found[name] = rows[self._tokens(name, index, len(rows), rows.device)]
                if len(found) == len(names):
                    raise _Reached
                return forward(x, *args, **kwargs)

            return function

        with contextlib.suppress(_Reached):
            self._streams.run(stream, index, {**linears, **{name: probe(name) for name in names}})
        return found

    def _tokens(self, name: str, index: int, count: int, device: torch.device) -> torch.Tensor:
        """Indices of the sampled tokens, ascending."""
        judges = index in self._streams.validation
        calls = len(self._streams.validation if judges else self._streams.calibration)
        rows = _VALIDATION_ROWS if judges else max(_LEAST_ROWS, _ROWS_PER_CHANNEL * self._widths[name])
        wanted = -(-rows // calls)
        if count <= wanted:
            return torch.arange(count, device=device)
        generator = torch.Generator().manual_seed(hash((self._seed, index, count)) & (2**63 - 1))
        return torch.randperm(count, generator=generator)[:wanted].sort().values.to(device)
