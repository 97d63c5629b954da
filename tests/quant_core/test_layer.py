"""Layers: weights that compensate quantized activations, and the error of their output on a card."""

import pytest
import torch

from learned_rounding.quant_core import quantize_weight
from learned_rounding.quant_core.calibration import LayerStatistics, LowRankHessian
from learned_rounding.quant_core.calibration.accumulate import PairedHessianAccumulator
from learned_rounding.quant_core.calibration.panels import packed_size
from learned_rounding.quant_core.formats import make_codec
from learned_rounding.quant_core.layer import Layer, compensate_weight, output_error


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# Compensation

QUANTIZED = random(400, 12) @ random(12, 12, seed=1)
ACTIVATIONS = QUANTIZED + 0.1 * random(400, 12, seed=2)
WEIGHT = random(6, 12, seed=3)


def compensate(dampenings, quantized=QUANTIZED) -> torch.Tensor:
    cross, hessian = ACTIVATIONS.t() @ quantized / 400, quantized.t() @ quantized / 400
    return compensate_weight(WEIGHT, cross, hessian, ACTIVATIONS, quantized, dampenings)


def test_the_compensated_weight_is_the_ridge_regression():
    mean = (QUANTIZED.t() @ QUANTIZED / 400).diagonal().mean().double()
    ridge = 0.01 * mean * torch.eye(12, dtype=torch.float64)
    x, y = QUANTIZED.double(), ACTIVATIONS.double()
    expected = WEIGHT.double() @ (y.t() @ x / 400 + ridge) @ torch.linalg.inv(x.t() @ x / 400 + ridge)
    torch.testing.assert_close(compensate((0.01,)).double(), expected, rtol=1e-3, atol=1e-4)


def test_the_compensated_weight_lowers_the_output_error():
    expected = ACTIVATIONS @ WEIGHT.t()
    before, after = ((QUANTIZED @ weight.t() - expected).norm() for weight in (WEIGHT, compensate((0.001, 0.1))))
    assert after < before


def test_the_dampening_of_least_error_is_taken():
    assert torch.equal(compensate((0.001, 1e6)), compensate((0.001,)))


def test_a_weight_that_cannot_be_improved_stays():
    assert torch.equal(compensate((0.001,), quantized=ACTIVATIONS), WEIGHT)


def test_the_bias_takes_back_the_difference_of_the_mean_outputs():
    x = random(600, 16) * torch.logspace(0, 1, 16) + 3
    paired = PairedHessianAccumulator(16, torch.zeros(packed_size(32)), torch.device("cpu"))
    paired.add(x[:500])
    validation = LowRankHessian(x[500:].t() / 10, torch.zeros(16))
    layer = Layer(random(8, 16, seed=4), random(8, seed=5), LayerStatistics(paired.result(), validation))
    codec = make_codec("int8_tensorwise")
    made = layer.compensate(codec, correct_bias=True)
    expected = (x[:500] @ layer.weight.t() + layer.bias).mean(dim=0)
    got = (codec.quantize_activations(x[:500]) @ made.weight.t() + made.bias).mean(dim=0)
    torch.testing.assert_close(got, expected, rtol=1e-2, atol=1e-2)
    assert layer.compensate(codec, correct_bias=False).bias is layer.bias


def test_validation_activations_are_float32_of_the_statistics():
    rows = random(10, 16).half()
    layer = Layer(
        random(8, 16), statistics=LayerStatistics(torch.eye(16), LowRankHessian(rows.t() / 10**0.5, torch.zeros(16)))
    )
    assert layer.validation_activations.dtype is torch.float32
    assert Layer(random(8, 16)).validation_activations is None


# Output error


def test_the_error_of_int8_is_that_of_quantized_activations():
    weight, activations = random(8, 32), random(64, 32, seed=1)
    made = quantize_weight(weight, "int8_tensorwise", rounding="nearest")
    got = made.codec.quantize_activations(activations) @ made.dequantize().t()
    expected = activations @ weight.t()
    error = float((got - expected).norm() / expected.norm())
    assert output_error(weight, made, activations) == pytest.approx(error, rel=1e-5)


@pytest.mark.parametrize("options", [{}, {"full_precision_matmul": True}], ids=["default", "full precision"])
def test_fp8_is_measured_on_cards_that_dequantize_it_too(options):
    """Weights that FP8 holds exactly under a scale that bfloat16 rounds by 2⁻⁸, for activations that FP8 holds exactly."""
    scale = torch.tensor(1 + 255 / 2**16)
    weight = torch.arange(-8.0, 8).repeat(8, 2) * scale
    weight[0, 0] = 448 * scale
    activations = torch.arange(64 * 32).view(64, 32).remainder(5).float()
    made = quantize_weight(weight, "float8_e4m3fn", rounding="nearest", **options)
    assert torch.equal(made.dequantize(), weight)
    assert made.scale == scale
    cast = scale.bfloat16().float() / scale
    assert output_error(weight, made, activations) == pytest.approx(abs(float(cast) - 1), rel=1e-3)
    assert torch.equal(made.dequantize_in(torch.bfloat16).float(), (weight / scale).round() * scale.bfloat16().float())


def test_the_error_of_one_card_leaves_the_other_kind_out():
    weight, activations = random(32, 96), random(40, 96, seed=1)
    made = quantize_weight(weight, "nvfp4", rounding="nearest")
    native, old = (output_error(weight, made, activations, card) for card in ((10, 0), (9, 0)))
    assert native > old
    assert output_error(weight, made, activations) == native


def test_the_error_of_zero_outputs_is_zero():
    made = quantize_weight(torch.zeros(4, 16), "int8_tensorwise")
    assert output_error(torch.zeros(4, 16), made, random(5, 16)) == 0
