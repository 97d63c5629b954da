"""Layer: a linear layer with everything that decides how its weight is rounded."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from .calibration import LayerStatistics, LowRankHessian, PairedHessian, quantized_hessians
from .formats import Codec, QuantizedWeight
from .linalg import is_factored, lapack
from .rounding import MatrixMemo

__all__ = ["Layer", "compensate_weight", "output_error"]

# Dampenings, relative to the mean diagonal, of the compensated weight; validation activations choose.
_DAMPENINGS = (0.001, 0.01, 0.1, 1.0)
_COMPARED_ROWS = 256  # of the weight, on which the dampening is chosen
_OLDEST_CARD = (0, 0)  # compute capability


@dataclass(frozen=True)
class Layer:
    """One linear layer.

    Attributes:
        weight: (out, in), any float dtype, in the original basis.
        bias: (out,), or None.
        statistics: of the layer's activations, in the original basis.
        output_weight: float (out,), weight of each output channel in the loss; None for ones.
        memo: matrices that other formats of this layer have computed; None where it has one format.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None = None
    statistics: LayerStatistics = field(default_factory=LayerStatistics)
    output_weight: torch.Tensor | None = None
    memo: MatrixMemo | None = None

    @property
    def validation_activations(self) -> torch.Tensor | None:
        """Validation activations, float32 (tokens, in), on the weight's device; None where there are none."""
        rows = self.statistics.validation_activations
        return None if rows is None else rows.to(self.weight.device, torch.float32)

    def compensate(self, codec: Codec, *, correct_bias: bool) -> "Layer":
        """The layer that, for quantized activations X̂, is nearest to what this one computes from X.

        Its weight is W·(XᵀX̂ + λI)·(X̂ᵀX̂ + λI)⁻¹ and its statistics are those of X̂, which minimises ‖X·Wᵀ − X̂·Ŵᵀ‖
        (GPTAQ, arXiv 2504.02692). λ is chosen on the validation activations.

        Args:
            codec: how activations are quantized; without rotation.
            correct_bias: let the bias take back the difference of the mean outputs.
        """
        weight, paired, rows = self.weight.float(), self.statistics.hessian, self.validation_activations
        assert isinstance(paired, PairedHessian) and rows is not None
        inner, device = weight.shape[1], weight.device
        cross, quantized = quantized_hessians(paired, inner, device)
        reduced = codec.quantize_activations(rows)
        best = compensate_weight(weight, cross, quantized, rows, reduced, _DAMPENINGS)
        mean, quantized_mean = paired.mean.to(device).split(inner)
        bias = self.bias
        if bias is not None and correct_bias:
            bias = (bias.to(device).float() - best @ quantized_mean + weight @ mean).to(bias)
        validation = LowRankHessian(reduced.t() / len(rows) ** 0.5, torch.zeros(inner))
        return replace(self, weight=best, bias=bias, statistics=LayerStatistics(quantized, validation, quantized_mean))


def compensate_weight(
    weight: torch.Tensor,
    cross: torch.Tensor,
    hessian: torch.Tensor,
    activations: torch.Tensor,
    quantized: torch.Tensor,
    dampenings: Sequence[float],
) -> torch.Tensor:
    """W·(XᵀX̂ + λI)·(X̂ᵀX̂ + λI)⁻¹, which minimises ‖X·Wᵀ − X̂·Ŵᵀ‖² + λ‖Ŵ − W‖² (GPTAQ, arXiv 2504.02692).

    Args:
        weight: W, float32 (out, in).
        cross, hessian: XᵀX̂/n and X̂ᵀX̂/n, float32 (in, in).
        activations, quantized: X and X̂ of other tokens, float32 (tokens, in), on which λ is chosen.
        dampenings: λ relative to the mean diagonal of ``hessian``.
    """
    chosen = torch.linspace(0, len(weight) - 1, min(len(weight), _COMPARED_ROWS), device=weight.device).long()
    sample = weight[chosen]
    expected = activations @ sample.t()
    best, least = None, torch.linalg.vector_norm(quantized @ sample.t() - expected)
    shift, mean = cross - hessian, hessian.diagonal().mean()  # (C + λI) = (C − H) + (H + λI)

    def solve(rows: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
        return rows + lapack(torch.cholesky_solve, shift.t() @ rows.t(), factor).t()

    for dampening in dampenings:
        ridged = hessian.clone()
        ridged.diagonal().add_(dampening * mean)
        factor, info = lapack(torch.linalg.cholesky_ex, ridged)
        if is_factored(factor, info):
            loss = torch.linalg.vector_norm(quantized @ solve(sample, factor).t() - expected)
            if loss < least:
                best, least = factor, loss
    return weight if best is None else solve(weight, best).contiguous()


def output_error(
    weight: torch.Tensor,
    quantized: QuantizedWeight,
    activations: torch.Tensor,
    capability: tuple[int, int] | None = None,
) -> float:
    """‖X̂·Ŵᵀ − X·Wᵀ‖/‖X·Wᵀ‖ with X̂ the activations as ComfyUI quantizes them; 0 where the outputs are zero.

    Formats that not every card multiplies are judged on both kinds of cards, by the larger error: the others multiply X by
    the weight dequantized to bfloat16.

    Args:
        weight: W, float32 (out, in).
        activations: X, float32 (tokens, in), on the device of ``weight``.
        capability: compute capability of the card; None for both kinds.
    """
    expected = activations @ weight.t()
    total = torch.linalg.vector_norm(expected, dtype=torch.float64)
    codec = quantized.codec
    products = []
    for card in (None, _OLDEST_CARD) if capability is None else (capability,):
        if codec.quantizes_activations(card):
            products.append((codec.quantize_activations(activations, card), quantized.dequantize()))
        else:
            products.append((activations, quantized.dequantize_in(torch.bfloat16)))
    errors = [
        torch.linalg.vector_norm(x @ made.to(expected).t() - expected, dtype=torch.float64) for x, made in products
    ]
    return float(max(errors) / total) if total else 0.0
