"""Banks of experts are quantized expert by expert, each as a layer of its own."""

import pytest
import torch

from learned_rounding.quant_core import quantize_weight
from learned_rounding.quant_core.calibration import LayerStatistics, LowRankHessian
from learned_rounding.quant_core.errors import NonFiniteWeightError
from learned_rounding.quant_core.formats import make_codec
from learned_rounding.quant_core.quantize_bank import quantize_bank
from learned_rounding.quant_core.rounding import RoundingConfig

CPU = torch.device("cpu")
SHAPE = (3, 24, 64)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def raw(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def statistics(**more) -> LayerStatistics:
    x = random(256, 64, seed=5) * torch.logspace(0, -1, 64)
    return LayerStatistics(x.t() @ x / len(x), **more)


def quantize(weights, rounding=None, known=None, *, bias=None, format="nvfp4", check=None, seed=0):
    rounding = rounding or RoundingConfig("nearest")
    known = known or LayerStatistics()
    return quantize_bank(weights, bias, known, make_codec(format), rounding, device=CPU, check=check, seed=seed)


@pytest.mark.parametrize("rounding", ["nearest", "auto", "stochastic", "principal", "calibrated"])
def test_experts_are_rounded_as_layers(rounding):
    weights, known = random(*SHAPE), statistics() if rounding == "calibrated" else LayerStatistics()
    made = quantize(weights, RoundingConfig(rounding), known, seed=3)
    again = quantize(weights, RoundingConfig(rounding), known, seed=3)
    assert all(torch.equal(raw(made.parts[key]), raw(again.parts[key])) for key in made.parts)
    layers = [quantize_weight(w, "nvfp4", rounding=rounding, hessian=known.hessian, seed=3) for w in weights]
    for index, layer in enumerate(layers):
        own = layer.tensors("a")
        for suffix, tensor in made.parts.items():
            assert torch.equal(raw(tensor[index]), raw(own[f"a.{suffix}"]))
    lost = torch.stack([layer.dequantize() for layer in layers]) - weights
    assert made.weight_error == pytest.approx(float(lost.norm() / weights.norm()), rel=1e-4)
    assert made.scale_range == (
        min(layer.scale_range[0] for layer in layers),
        max(layer.scale_range[1] for layer in layers),
    )
    if rounding == "calibrated":
        assert made.output_error == pytest.approx(sum(layer.output_error for layer in layers) / 3)
        assert made.gain == pytest.approx(sum(layer.gain for layer in layers) / 3) and made.gain < 1
    else:
        assert made.output_error is None
    assert made.note.startswith("bank of 3 experts") and made.shape == SHAPE


def test_biases_are_corrected_per_expert():
    weights, bias = random(*SHAPE), random(3, 24).bfloat16()
    known = statistics(mean=torch.ones(64))
    made = quantize(weights, RoundingConfig("calibrated"), known, bias=bias)
    alone = quantize_weight(weights[1], "nvfp4", mean=known.mean, hessian=known.hessian, bias=bias[1])
    assert torch.equal(made.bias[1], alone.bias) and not torch.equal(made.bias, bias)
    assert made.bias.dtype is torch.bfloat16 and torch.equal(made.tensors("a")["a.bias"], made.bias)
    assert quantize(weights, bias=bias).bias is bias


def test_banks_are_not_smoothed():
    """ComfyUI does not read ``pre_quant_scale`` of banks."""
    x = random(128, 64, seed=9)
    x[:, ::8] *= 30
    validation = LowRankHessian(x.t() / len(x) ** 0.5, torch.zeros(64))
    known = LayerStatistics(x.t() @ x / len(x), validation)
    rounding = RoundingConfig("calibrated", smoothing=True)
    assert quantize(random(*SHAPE), rounding, known).parts.keys() == {"weight", "weight_scale", "weight_scale_2"}


def test_one_expert_with_nan_refuses_the_bank():
    weights = random(*SHAPE)
    weights[2, 3, 4] = torch.nan
    with pytest.raises(NonFiniteWeightError):
        quantize(weights)


def test_a_run_is_cancelled_between_experts():
    class Stop(Exception):
        pass

    calls = []

    def check():
        calls.append(1)
        if len(calls) == 2:
            raise Stop

    with pytest.raises(Stop):
        quantize(random(50, 1, 16), check=check)
    assert len(calls) == 2
