"""What is learned of the layers of a block: rounding offsets of weights near a tie."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch

from ..formats import QuantizedWeight
from .linear import LinearFunction, reduce_inputs

__all__ = ["LearnedLayer", "Offsets", "RoundedLayer"]

_TOLERANCE = 0.3  # τ; with the default rates an offset moves by 0.24 at most
_HIGHEST = 0.45  # largest x at the start
# Components of a gradient are limited to this multiple of their root mean square: those of single weights are a hundred times
# as large.
_STEEPEST = 3.0
_UNIT = (
    1 / 32
)  # root mean square of the gradients that optimizers get: the first steps of RAdam are proportional to them


@dataclass(frozen=True)
class RoundedLayer:
    """A layer of the block.

    Attributes:
        weight: (out, in), of the original model.
        target: what was rounded, (out, in): the compensated weight.
        quantized: the result that reconstruction starts from.
    """

    weight: torch.Tensor
    target: torch.Tensor
    quantized: QuantizedWeight


class LearnedLayer:
    """A layer as a function of its offsets x.

    Attributes:
        start: x of the weights near a tie, float32 (n,).
    """

    def __init__(self, layer: RoundedLayer, capability: tuple[int, int] | None):
        self.quantized, self._capability = layer.quantized, capability
        solution, codec = self.quantized.solution, self.quantized.codec
        space = codec.solve_space((layer.weight.shape[0], layer.weight.shape[1]))
        self._space = space.with_levels(solution.levels) if solution.levels else space
        self._weight = layer.weight
        self._qdata, self._scale = solution.qdata.clone(), solution.scale.clone()  # not of inference mode
        self._bias = None if self.quantized.bias is None else self.quantized.bias.clone()
        target = space.basis.apply_weight(layer.target) if space.basis else layer.target.float()
        self._choose(target / self._space.divisor(self._scale))

    def _choose(self, scaled: torch.Tensor) -> None:
        """Find the weights near a tie; ``scaled``: w/s."""
        low, high = self._space.neighbours(scaled)
        values = self._qdata.float()
        other = torch.where((values < low) | (values == high), low, high)
        position = (scaled - values) / (other - values)  # of a value without another neighbour NaN or ±Inf
        self._near = near = (other != values) & (position > 0.5 - _TOLERANCE)
        self.start = position[near].clamp_(max=_HIGHEST)
        self._values, self._other = values[near], other[near]
        self._distance = ((other - values) * self._space.groups.spread(self._scale))[near]

    def qdata(self, x: torch.Tensor) -> torch.Tensor:
        """Quantized values (out, in)."""
        values = torch.where(x > 0.5, self._other, self._values)
        return self._qdata.float().masked_scatter_(self._near, values).to(self._qdata.dtype)

    def dequantize(self, x: torch.Tensor) -> torch.Tensor:
        """Ŵ, float32 (out, in) in the original basis."""
        return self.quantized.codec.restore_weight(self._space.decode(self.qdata(x), self._scale))

    def gradient(self, gradient: torch.Tensor) -> torch.Tensor:
        """The gradient of the offsets from that of Ŵ, passed straight through the rounding."""
        stored = self._space.basis.apply(gradient) if self._space.basis else gradient
        return stored.masked_select(self._near) * self._distance

    def linear(self, weight: torch.Tensor) -> "_Linear":
        """The layer as it runs with Ŵ, with a gradient."""
        return _Linear(self.quantized, weight, self._bias, self._capability)

    def result(self, x: torch.Tensor) -> QuantizedWeight:
        """The layer to store."""
        weight = self._weight.float()
        error = float((self.dequantize(x) - weight).norm() / weight.norm().clamp_min(1e-30))
        solution = replace(
            self.quantized.solution,
            solver="reconstructed",
            qdata=self.qdata(x),
            weight_error=error,
            gain=None,
            output_error=None,
        )
        return replace(self.quantized, solution=solution)


class Offsets:
    """The offsets of all layers of a block.

    Attributes:
        x: float32 (n,), what an optimizer steps.
    """

    def __init__(self, layers: Mapping[str, LearnedLayer]):
        self._layers = layers
        self.x = torch.nn.Parameter(torch.cat([layer.start for layer in layers.values()]))

    def _split(self) -> Iterator[tuple[str, LearnedLayer, torch.Tensor]]:
        """Name, layer and offsets of each layer."""
        parts = self.x.detach().split([len(layer.start) for layer in self._layers.values()])
        yield from zip(self._layers, self._layers.values(), parts, strict=True)

    def linears(self) -> dict[str, LinearFunction]:
        """The layers after rounding."""
        return {name: layer.linear(layer.dequantize(x)) for name, layer, x in self._split()}

    def results(self) -> dict[str, QuantizedWeight]:
        """The layers to store."""
        return {name: layer.result(x) for name, layer, x in self._split()}

    def gradient(self, loss_of: Callable[[Mapping[str, LinearFunction]], torch.Tensor]) -> torch.Tensor:
        """The gradient (n,) of a loss of the layers.

        Raises:
            RuntimeError: none reaches a layer, or what autograd raises.
        """
        leaves = {name: layer.linear(layer.dequantize(x).requires_grad_()) for name, layer, x in self._split()}
        with torch.enable_grad():
            loss = loss_of(leaves)
        found = torch.autograd.grad(loss, [leaf.weight for leaf in leaves.values()], allow_unused=True)
        gradients = []
        for (name, layer, x), leaf, gradient in zip(self._split(), leaves.values(), found, strict=True):
            if gradient is None and leaf.called:
                raise RuntimeError(f"no gradient reaches {name}")
            gradients.append(torch.zeros_like(x) if gradient is None else layer.gradient(gradient))
        return torch.cat(gradients)

    def descend(self, solver: torch.optim.Optimizer, gradient: torch.Tensor, unit: float) -> None:
        """One step of an optimizer of :attr:`x`; ``unit``: root mean square of a gradient."""
        self.x.grad = gradient.div_(unit).clamp_(-_STEEPEST, _STEEPEST).mul_(_UNIT)
        solver.step()


class _Linear:
    """A quantized layer with a gradient; the interface of :class:`~.linear.QuantizedLinear`.

    Attributes:
        weight: Ŵ, float32 (out, in).
        called: whether it has been called.
    """

    def __init__(
        self,
        quantized: QuantizedWeight,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        capability: tuple[int, int] | None,
    ):
        self.weight, self.called = weight, False
        self._quantized, self._bias, self._capability = quantized, bias, capability

    def __call__(self, x: torch.Tensor, *_) -> torch.Tensor:
        self.called = True
        codec, capability = self._quantized.codec, self._capability
        if codec.quantizes_activations(capability):
            reduced = reduce_inputs(codec, x.detach(), self._quantized.input_scale, capability)
            x = _StraightThrough.apply(x, reduced)  # type: ignore[assignment]
        bias = None if self._bias is None else self._bias.to(x)
        return torch.nn.functional.linear(x, self.weight.to(x.dtype), bias)


class _StraightThrough(torch.autograd.Function):
    """The quantized activations, with the gradient of the activations."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, reduced: torch.Tensor) -> torch.Tensor:
        return reduced

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):  # type: ignore[override]
        return gradient, None
