"""Rounding of the layers of one block, for the activations of the quantized model.

Layers that share an input are one group; the groups are rounded in the order of their execution. With X the inputs of a group
in the original model and X̂ those in the quantized model, quantized as at run time, a weight W is replaced by

    W·(XᵀX̂ + λI)·(X̂ᵀX̂ + λI)⁻¹                                                                                     (1)

and rounded under X̂ᵀX̂ (GPTAQ, arXiv 2504.02692; Qronos, arXiv 2505.11695). λ is chosen on the validation calls.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from ..calibration import LayerStatistics, LowRankHessian
from ..calibration.products import add_product, matmul_operand
from ..cancellation import CancelCheck
from ..errors import CalibrationError
from ..formats import Codec, QuantizedWeight
from ..layer import Layer, compensate_weight
from ..quantize_layer import quantize_layer
from ..rounding import RoundingConfig
from .capture import InputSampler
from .learned import RoundedLayer
from .linear import LinearFunction, QuantizedLinear, quantize_inputs
from .streams import Stream, Streams

__all__ = ["BlockRounding", "PendingLayer"]

_DAMPENINGS = (0.05, 0.2, 1.0)  # λ relative to the mean diagonal
_BATCH = 8192  # tokens of several calls that are quantized together

Rows = Mapping[int, torch.Tensor]
"""Call → sampled inputs of a layer (tokens, in)."""


@dataclass(frozen=True)
class PendingLayer:
    """A layer of a block with its layer-wise result.

    Attributes:
        layer: weight and bias on the device.
        plain: the result of calibrated rounding.
        rounding: how the compensated weight is rounded.
        seed: of all random draws.
    """

    layer: Layer
    plain: QuantizedWeight
    rounding: RoundingConfig
    seed: int

    def linear(self, quantized: QuantizedWeight, capability: tuple[int, int] | None) -> QuantizedLinear:
        """The layer as it runs with this result."""
        device = self.layer.weight.device
        parts = {suffix: part.to(device) for suffix, part in quantized.parts().items()}
        return QuantizedLinear(quantized.codec, parts, quantized.shape, capability)


@dataclass(frozen=True)
class _Activations:
    """Statistics of the inputs of a group of layers.

    Attributes:
        cross, hessian: XᵀX̂/n and X̂ᵀX̂/n, float32 (in, in).
        mean, quantized_mean: means of X and X̂, float32 (in,).
        validation, quantized_validation: X and X̂ of the validation calls, float32 (tokens, in).
    """

    cross: torch.Tensor
    hessian: torch.Tensor
    mean: torch.Tensor
    quantized_mean: torch.Tensor
    validation: torch.Tensor
    quantized_validation: torch.Tensor


class BlockRounding:
    """Round the layers of the block at which all calls wait.

    Groups of which none depends on another, such as those of two token streams, are rounded together.

    Args:
        layers: by name.
        groups: names of layers by shared input, in the order of execution.
        weights: weight of each call in the loss; their mean is 1.
        linears: layers outside of blocks, as they run quantized.
        capability: compute capability that activations are quantized for; None for a card that multiplies the format.
        on_layer: called before each layer is rounded.
    """

    def __init__(
        self,
        streams: Streams,
        sampler: InputSampler,
        layers: Mapping[str, PendingLayer],
        groups: Sequence[Sequence[str]],
        *,
        weights: Mapping[int, float],
        linears: Mapping[str, LinearFunction],
        capability: tuple[int, int] | None,
        check: CancelCheck,
        on_layer: Callable[[], None],
    ):
        self._streams, self._sampler, self._layers = streams, sampler, layers
        present = ([name for name in group if name in layers] for group in groups)
        self._groups = [group for group in present if group]
        self._weights, self._linears, self._capability = weights, linears, capability
        self._check, self._on_layer = check, on_layer

    def round(self) -> dict[str, RoundedLayer]:
        """The layers after sequential rounding, with their compensated weights.

        Raises:
            CalibrationError: activations contain NaN or Inf.
        """
        original = self._sample_original()
        results: dict[str, RoundedLayer] = {}
        linears = dict(self._linears)
        for level in self._find_levels():
            quantized = self._sample_quantized([group[0] for group in level], linears)
            made: dict[str, RoundedLayer] = {}
            for group in level:
                made |= dict(self._round_group(group, original.pop(group[0]), quantized.pop(group[0])))
            results |= made
            linears |= {
                name: self._layers[name].linear(
                    made[name].quantized if name in made else self._layers[name].plain, self._capability
                )
                for name in itertools.chain(*level)
            }
        return results

    def _find_levels(self) -> list[list[list[str]]]:
        """The groups, each after all whose outputs change its input; found by changing them in one call."""
        first = [group[0] for group in self._groups]
        exact = self._sampler.sample(Stream.ORIGINAL, self._calls[0], first, {})
        changed = [self._change(group, first) for group in self._groups[:-1]]
        depths: list[int] = []
        for position, name in enumerate(first):
            depends = [depths[earlier] for earlier in range(position) if not _are_equal(name, exact, changed[earlier])]
            depths.append(max(depends, default=-1) + 1)
        levels: list[list[list[str]]] = [[] for _ in range(max(depths, default=-1) + 1)]
        for group, depth in zip(self._groups, depths, strict=True):
            levels[depth].append(group)
        return levels

    def _change(self, group: Sequence[str], names: Sequence[str]) -> dict[str, torch.Tensor]:
        """Inputs of some layers in one call of the original model in which the outputs of one group are others."""
        modules = {name: self._sampler.forward(name) for name in group}
        linears = {name: lambda x, *_, forward=forward: forward(x).flip(-1) + 1 for name, forward in modules.items()}
        return self._sampler.sample(Stream.ORIGINAL, self._calls[0], names, linears)

    def _sample_original(self) -> dict[str, dict[int, torch.Tensor]]:
        """First layer of each group → its inputs in the original model."""
        return self._sample(Stream.ORIGINAL, [group[0] for group in self._groups], {})

    def _sample_quantized(
        self, names: Sequence[str], linears: Mapping[str, LinearFunction]
    ) -> dict[str, dict[int, torch.Tensor]]:
        """Layer → its inputs in the quantized model."""
        return self._sample(Stream.QUANTIZED, names, linears)

    def _sample(
        self, stream: Stream, names: Sequence[str], linears: Mapping[str, LinearFunction]
    ) -> dict[str, dict[int, torch.Tensor]]:
        sampled: dict[str, dict[int, torch.Tensor]] = {name: {} for name in names}
        for index in self._calls:
            for name, rows in self._sampler.sample(stream, index, names, linears).items():
                sampled[name][index] = rows
        return sampled

    @property
    def _calls(self) -> list[int]:
        return [*self._streams.calibration, *self._streams.validation]

    def _round_group(self, group: Sequence[str], original: Rows, quantized: Rows) -> Iterator[tuple[str, RoundedLayer]]:
        """Round layers that share their inputs, whose activations are quantized alike or not.

        Nothing is rounded where no calibration call or no validation call runs them.
        """
        calls = original.keys() & quantized.keys()
        if calls.isdisjoint(self._streams.calibration) or calls.isdisjoint(self._streams.validation):
            return
        latest, activations = None, None
        for name in group:
            plain = self._layers[name].plain
            kind = str(plain.codec), plain.input_scale, name if plain.codec.smoothing else ""
            if activations is None or kind != latest:
                latest, activations = kind, self._measure(plain.codec, plain.input_scale, original, quantized)
                if not (activations.cross.isfinite().all() and activations.hessian.isfinite().all()):
                    raise CalibrationError(f"the input activations of {name} contain NaN or Inf.")
            self._on_layer()
            yield name, self._round_layer(self._layers[name], activations)

    def _measure(self, codec: Codec, input_scale: float | None, original: Rows, quantized: Rows) -> _Activations:
        """Statistics of a group with activations quantized for a codec."""
        first = next(iter(original.values()))
        inner, device = first.shape[1], first.device
        cross, hessian = torch.zeros(2, inner, inner, device=device)
        sums, count = torch.zeros(2, inner, dtype=torch.float64, device=device), 0
        for exact, reduced in self._pairs(codec, input_scale, original, quantized, self._streams.calibration):
            right = matmul_operand(reduced)
            add_product(cross, matmul_operand(exact).t(), right)
            add_product(hessian, right.t(), right)
            sums += torch.stack([exact.sum(dim=0, dtype=torch.float32), reduced.sum(dim=0, dtype=torch.float32)])
            count += len(exact)
        judged = list(self._pairs(codec, input_scale, original, quantized, self._streams.validation))
        mean, quantized_mean = (sums / count).float()
        return _Activations(
            cross.div_(count),
            hessian.div_(count),
            mean,
            quantized_mean,
            torch.cat([exact for exact, _ in judged]).float(),
            torch.cat([reduced for _, reduced in judged]).float(),
        )

    def _pairs(
        self, codec: Codec, input_scale: float | None, original: Rows, quantized: Rows, calls: Sequence[int]
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """X and X̂ of those of some calls that run the layer, weighted, a batch at a time."""
        calls = [index for index in calls if index in original and index in quantized]
        batch: list[int] = []
        for index in calls:
            batch.append(index)
            if index != calls[-1] and sum(len(original[each]) for each in batch) < _BATCH:
                continue
            self._check()
            exact = torch.cat([original[each] for each in batch])
            raw = torch.cat([quantized[each] for each in batch])
            reduced = quantize_inputs(codec, raw, input_scale, self._capability).to(exact)
            weights = [self._weights[each] ** 0.5 for each in batch]
            if any(weight != 1 for weight in weights):
                counts = torch.tensor([len(original[each]) for each in batch], device=exact.device)
                rows = torch.tensor(weights, device=exact.device).repeat_interleave(counts)[:, None].to(exact)
                exact, reduced = exact * rows, reduced * rows
            yield exact, reduced
            batch = []

    def _round_layer(self, pending: PendingLayer, activations: _Activations) -> RoundedLayer:
        """Round the compensated weight of one layer."""
        layer, plain = pending.layer, pending.plain
        weight = layer.weight.float()
        exact, reduced = activations.validation, activations.quantized_validation
        target = compensate_weight(weight, activations.cross, activations.hessian, exact, reduced, _DAMPENINGS)
        bias = layer.bias
        if bias is not None and pending.rounding.get("bias_correction") == "auto":
            bias = bias.to(weight.device).float() + weight @ activations.mean - target @ activations.quantized_mean
        validation = LowRankHessian(reduced.t() / len(reduced) ** 0.5, torch.zeros(len(target[0])))
        statistics = LayerStatistics(activations.hessian, validation, activations.quantized_mean)
        made = quantize_layer(
            Layer(target, bias, statistics),
            [plain.codec],
            replace(pending.rounding, damping=pending.rounding.damping or plain.solution.dampening),
            input_scale=plain.input_scale,
            seed=pending.seed,
            check=self._check,
        )
        values = made.dequantize()
        expected = exact @ weight.t()
        error = torch.linalg.vector_norm(reduced @ values.t() - expected, dtype=torch.float64)
        solution = replace(
            made.solution,
            weight_error=float((values - weight).norm() / weight.norm().clamp_min(1e-30)),
            output_error=float(error / torch.linalg.vector_norm(expected, dtype=torch.float64).clamp_min(1e-30)),
        )
        bias = None if made.bias is None or layer.bias is None else made.bias.to(layer.bias)
        return RoundedLayer(weight, target, replace(made, solution=solution, bias=bias))


def _are_equal(name: str, left: Mapping[str, torch.Tensor], right: Mapping[str, torch.Tensor]) -> bool:
    """Whether a layer has the same inputs in two runs of a block."""
    return name in left and name in right and torch.equal(left[name], right[name])
