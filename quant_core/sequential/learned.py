"""What is learned of the layers of a block: rounding offsets of weights and gains of scales."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from ..formats import QuantizedWeight
from ..rounding.rtn import weight_error
from .linear import LinearFunction, reduce_inputs

__all__ = ["LearnedLayer", "Parameters", "RoundedLayer"]

_TOLERANCE = 0.5  # τ
_HIGHEST = 0.45  # largest x at the start
_PULL = 0.0  # of a step of length r, x goes back to its start by this times r


@dataclass(frozen=True)
class RoundedLayer:
    """A layer of the block.

    Attributes:
        weight: what was rounded, float32 (out, in), in the original basis; for sequential rounding the compensated weight.
        quantized: the result that reconstruction starts from.
    """

    weight: torch.Tensor
    quantized: QuantizedWeight


class LearnedLayer:
    """A layer as a function of its offsets x and of the gains of its scales; tensors that are shared by all steps.

    Attributes:
        start: x of the weights near a tie, float32 (n,).
        gains: number of scales that are learned: float32 scales of rows or of the tensor, else 0.
    """

    def __init__(self, layer: RoundedLayer, capability: tuple[int, int]):
        self.quantized, self._capability = layer.quantized, capability
        solution, codec = self.quantized.solution, self.quantized.codec
        space = codec.solve_space((layer.weight.shape[0], layer.weight.shape[1]))
        self._space = space.with_levels(solution.levels) if solution.levels else space
        self._weight = space.basis.apply_weight(layer.weight) if space.basis else layer.weight.float()
        self._qdata, self._scale = solution.qdata.clone(), solution.scale.clone()  # not of inference mode
        self._bias = None if self.quantized.bias is None else self.quantized.bias.clone()
        self.gains = self._scale.numel() if space.scales.continuous and self._scale.shape[1] == 1 else 0
        self._choose(self._weight / self._space.divisor(self._scale))

    def _choose(self, scaled: torch.Tensor) -> None:
        """Find the weights near a tie; ``scaled``: w/s."""
        low, high = self._space.neighbours(scaled)
        values = self._qdata.float()
        other = torch.where((values < low) | (values == high), low, high)
        position = (scaled - values) / (other - values)  # of a value without another neighbour NaN or ±Inf
        near = (other != values) & (position > 0.5 - _TOLERANCE)
        self._chosen = near.flatten().nonzero().squeeze(1)
        self.start = position[near].clamp_(max=_HIGHEST)
        self._values, self._other = values[near], other[near]
        self._distance = ((other - values) * self._space.groups.spread(self._scale))[near]

    def qdata(self, x: torch.Tensor) -> torch.Tensor:
        """Quantized values (out, in)."""
        values = torch.where(x > 0.5, self._other, self._values).to(self._qdata.dtype)
        flat = self._qdata.flatten().clone()
        flat[self._chosen] = values
        return flat.view_as(self._qdata)

    def scale(self, gain: torch.Tensor) -> torch.Tensor:
        """Effective scales."""
        if not self.gains:
            return self._scale
        return self._space.scales.snap(self._scale * (1 + gain[:, None]), None)

    def dequantize(self, x: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
        """Ŵ, float32 (out, in) in the original basis."""
        return self.quantized.codec.restore_weight(self._space.decode(self.qdata(x), self.scale(gain)))

    def gradients(self, gradient: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Gradients of the offsets and of the gains from that of Ŵ."""
        stored = self._space.basis.apply(gradient) if self._space.basis else gradient
        rows = (stored * self._space.decode(self.qdata(x), self._scale)).sum(dim=1)
        gains = rows if self.gains > 1 else rows.sum(dim=0, keepdim=True)
        return stored.flatten()[self._chosen] * self._distance, gains[: self.gains]

    def linear(self, weight: torch.Tensor) -> "_Linear":
        """The layer as it runs with Ŵ, with a gradient."""
        return _Linear(self.quantized, weight, self._bias, self._capability)

    def result(self, x: torch.Tensor, gain: torch.Tensor) -> QuantizedWeight:
        """The layer to store."""
        qdata, scale = self.qdata(x), self.scale(gain)
        error = weight_error(self._weight, qdata, scale, self._space)
        solution = replace(
            self.quantized.solution, qdata=qdata, scale=scale, weight_error=error, solver="reconstructed"
        )
        return replace(self.quantized, solution=solution)


class Parameters:
    """All offsets and gains of a block, two tensors."""

    def __init__(self, layers: Mapping[str, LearnedLayer]):
        self._layers = layers
        device = next(iter(layers.values())).start.device
        self._offsets = torch.nn.Parameter(torch.cat([layer.start for layer in layers.values()]))
        self._gains = torch.nn.Parameter(torch.zeros(sum(layer.gains for layer in layers.values()), device=device))
        self._start = self._offsets.detach().clone()

    @property
    def tensors(self) -> list[torch.nn.Parameter]:
        """What an optimizer steps."""
        return [tensor for tensor in (self._offsets, self._gains) if tensor.numel()]

    def _split(self) -> Iterator[tuple[str, LearnedLayer, torch.Tensor, torch.Tensor]]:
        """Name, layer, offsets and gains of each layer."""
        layers = self._layers.values()
        offsets = self._offsets.detach().split([len(layer.start) for layer in layers])
        gains = self._gains.detach().split([layer.gains for layer in layers])
        yield from zip(self._layers, layers, offsets, gains, strict=True)

    def linears(self) -> dict[str, LinearFunction]:
        """The layers after rounding."""
        return {name: layer.linear(layer.dequantize(x, gain)) for name, layer, x, gain in self._split()}

    def results(self) -> dict[str, QuantizedWeight]:
        """The layers to store."""
        return {name: layer.result(x, gain) for name, layer, x, gain in self._split()}

    def gradients(self, loss_of: Callable[[Mapping[str, LinearFunction]], torch.Tensor]) -> dict[str, torch.Tensor]:
        """Gradients of a loss of the layers, by layer for the offsets and for the gains.

        Raises:
            RuntimeError: none reaches a layer, or what autograd raises.
        """
        leaves = {
            name: layer.linear(layer.dequantize(x, gain).requires_grad_()) for name, layer, x, gain in self._split()
        }
        with torch.enable_grad():
            loss = loss_of(leaves)
        if not loss.requires_grad:
            raise RuntimeError("its outputs have no gradient")
        found = torch.autograd.grad(loss, [leaf.weight for leaf in leaves.values()], allow_unused=True)
        gradients: dict[str, torch.Tensor] = {}
        for (name, layer, x, _), leaf, gradient in zip(self._split(), leaves.values(), found, strict=True):
            if gradient is None and leaf.called:
                raise RuntimeError(f"no gradient reaches {name}")
            gradient = torch.zeros_like(leaf.weight) if gradient is None else gradient
            gradients[f"{name}.offsets"], gradients[f"{name}.gains"] = layer.gradients(gradient, x)
        return gradients

    def descend(self, solver: torch.optim.Optimizer, gradients: Mapping[str, torch.Tensor], unit: float) -> None:
        """One step along gradients, divided by ``unit``."""
        for tensor, kind in ((self._offsets, "offsets"), (self._gains, "gains")):
            tensor.grad = torch.cat([gradients[f"{name}.{kind}"] for name in self._layers]).div_(unit)
        solver.step()
        if _PULL:
            self._offsets.lerp_(self._start, _PULL * solver.param_groups[0]["lr"])

    def copy(self) -> list[torch.Tensor]:
        """The state, for :meth:`restore`."""
        return [tensor.detach().clone() for tensor in (self._offsets, self._gains)]

    def restore(self, state: Sequence[torch.Tensor]) -> None:
        """Return to a state."""
        for tensor, value in zip((self._offsets, self._gains), state, strict=True):
            tensor.copy_(value)


class _Linear:
    """A quantized layer with a gradient; the interface of :class:`~.linear.QuantizedLinear`.

    Attributes:
        weight: Ŵ, float32 (out, in).
        called: whether it has been called.
    """

    def __init__(
        self, quantized: QuantizedWeight, weight: torch.Tensor, bias: torch.Tensor | None, capability: tuple[int, int]
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
