"""Bias correction: with the real mean input it removes the mean output error, and its sign is right."""

import pytest
import torch

from learned_rounding.quant_core import quantize_weight
from learned_rounding.quant_core.errors import CalibrationError


@pytest.mark.parametrize("options", [{}, {"convrot": 16}, {"rounding": "nearest"}, {"rounding": "stochastic"}])
def test_the_mean_output_error_falls_on_held_out_inputs(gaussian, anisotropic, options):
    weight, bias, known = gaussian(24, 64), gaussian(24, seed=9), anisotropic(64, tokens=4000)
    inputs = known.inputs  # others than those of the mean
    made = quantize_weight(weight, "int8_tensorwise", bias=bias, mean=known.mean, **options)
    wanted = (inputs @ weight.t() + bias).mean(dim=0)
    got = (inputs @ made.dequantize().t()).mean(dim=0)
    without, corrected = (got + bias - wanted).norm(), (got + made.bias - wanted).norm()
    assert corrected < 0.2 * without


def test_without_a_mean_nothing_is_corrected(gaussian):
    bias = gaussian(24)
    assert quantize_weight(gaussian(24, 64), "int8_tensorwise", bias=bias).bias is bias
    known = quantize_weight(gaussian(24, 64), "int8_tensorwise", bias=bias, mean=torch.ones(64), bias_correction="none")
    assert known.bias is bias
    assert quantize_weight(gaussian(24, 64), "int8_tensorwise", mean=torch.ones(64)).bias is None


def test_the_synthetic_mean_is_asked_for_and_says_what_it_is(gaussian, sentences):
    weight, bias = gaussian(24, 64), gaussian(24)
    options = {"bias": bias, "bias_correction": "synthetic"}
    made = [quantize_weight(weight, "int8_tensorwise", **options, calib_samples=n, seed=1) for n in (4, 4, 4000)]
    sentences(made[0].note)
    assert torch.equal(made[0].bias, made[1].bias) and not torch.equal(made[0].bias, bias)
    assert (made[2].bias - bias).norm() < 0.2 * (made[0].bias - bias).norm()


def test_the_bias_keeps_its_dtype(gaussian):
    bias = gaussian(24).to(torch.float16)
    assert quantize_weight(gaussian(24, 64), "int8_tensorwise", bias=bias, mean=torch.ones(64)).bias.dtype is bias.dtype


@pytest.mark.parametrize("mean", [torch.ones(63), torch.ones(1, 64), torch.full((64,), float("nan"))])
def test_a_mean_that_does_not_fit_is_refused(gaussian, mean, sentences):
    with sentences.raises(CalibrationError):
        quantize_weight(gaussian(24, 64), "int8_tensorwise", bias=gaussian(24), mean=mean)
