"""Banks of experts are quantized expert by expert, each as a layer of its own."""

from types import SimpleNamespace

import pytest
import torch

from learned_rounding.quant_core import quantize_weight
from learned_rounding.quant_core.calibration import LayerStatistics, LowRankHessian
from learned_rounding.quant_core.errors import NonFiniteWeightError
from learned_rounding.quant_core.formats import make_codec
from learned_rounding.quant_core.quantize_bank import quantize_bank
from learned_rounding.quant_core.rounding import RoundingConfig
from learned_rounding.tests.quant_core.formats.weights import raw

CPU = torch.device("cpu")
SHAPE = (3, 24, 64)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def statistics(**more) -> LayerStatistics:
    x = random(256, 64, seed=5) * torch.logspace(0, -1, 64)
    return LayerStatistics(x.t() @ x / len(x), **more)


def quantize(weights, rounding=None, known=None, *, bias=None, format="nvfp4", check=None, seed=0):
    rounding = rounding or RoundingConfig("nearest")
    known = known or LayerStatistics()
    return quantize_bank(weights, bias, known, make_codec(format), rounding, device=CPU, check=check, seed=seed)


@pytest.fixture(params=["nearest", "auto", "stochastic", "principal", "calibrated"])
def bank(request):
    """A bank of one rounding, and its experts quantized as layers."""
    rounding, weights = request.param, random(*SHAPE)
    known = statistics() if rounding == "calibrated" else LayerStatistics()
    return SimpleNamespace(
        rounding=rounding,
        weights=weights,
        known=known,
        made=quantize(weights, RoundingConfig(rounding), known, seed=3),
        layers=[quantize_weight(w, "nvfp4", rounding=rounding, hessian=known.hessian, seed=3) for w in weights],
    )


def test_experts_are_rounded_as_layers(subtests, bank):
    for index, layer in enumerate(bank.layers):
        own = layer.tensors("a")
        for suffix, tensor in bank.made.parts.items():
            with subtests.test(suffix, expert=index):
                assert torch.equal(raw(tensor[index]), raw(own[f"a.{suffix}"]))


def test_the_same_seed_gives_the_same_bytes(bank):
    again = quantize(bank.weights, RoundingConfig(bank.rounding), bank.known, seed=3)
    made = bank.made.parts
    assert [key for key in made if not torch.equal(raw(made[key]), raw(again.parts[key]))] == []


def test_errors_are_those_of_the_experts_together(bank):
    made, layers = bank.made, bank.layers
    lost = torch.stack([layer.dequantize() for layer in layers]) - bank.weights
    assert made.weight_error == pytest.approx(float(lost.norm() / bank.weights.norm()), rel=1e-4)
    if bank.rounding == "calibrated":
        assert made.output_error == pytest.approx(sum(layer.output_error for layer in layers) / 3)
        assert made.gain == pytest.approx(sum(layer.gain for layer in layers) / 3)
        assert made.gain < 1
    else:
        assert made.output_error is None


def test_the_bank_is_described_as_a_whole(bank):
    smallest, largest = zip(*(layer.scale_range for layer in bank.layers), strict=True)
    assert bank.made.scale_range == (min(smallest), max(largest))
    assert bank.made.note.startswith("bank of 3 experts")
    assert bank.made.shape == SHAPE


def test_biases_are_corrected_per_expert():
    weights, bias = random(*SHAPE), random(3, 24).bfloat16()
    known = statistics(mean=torch.ones(64))
    made = quantize(weights, RoundingConfig("calibrated"), known, bias=bias)
    alone = quantize_weight(weights[1], "nvfp4", mean=known.mean, hessian=known.hessian, bias=bias[1])
    assert torch.equal(made.bias[1], alone.bias)
    assert not torch.equal(made.bias, bias)
    assert made.bias.dtype is torch.bfloat16
    assert torch.equal(made.tensors("a")["a.bias"], made.bias)


def test_a_bias_without_a_mean_is_kept():
    bias = random(3, 24).bfloat16()
    assert quantize(random(*SHAPE), bias=bias).bias is bias


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
