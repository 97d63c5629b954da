"""Bias correction: with the real mean input it removes the mean output error, and its sign is right."""

import torch

from learned_rounding.quant_core import quantize_weight
from learned_rounding.quant_core.errors import CalibrationError
from learned_rounding.quant_core.rounding import synthetic_mean


def test_the_mean_output_error_falls_on_validation_activations(subtests, gaussian, anisotropic):
    weight, bias, known = gaussian(24, 64), gaussian(24, seed=9), anisotropic(64, tokens=4000)
    wanted = (known.inputs @ weight.t() + bias).mean(dim=0)  # of other activations than those of the mean
    for options in ({}, {"convrot": 16}, {"rounding": "nearest"}, {"rounding": "stochastic"}):
        made = quantize_weight(weight, "int8_tensorwise", bias=bias, mean=known.mean, **options)
        got = (known.inputs @ made.dequantize().t()).mean(dim=0)
        without, corrected = (got + bias - wanted).norm(), (got + made.bias - wanted).norm()
        with subtests.test(**options):
            assert corrected < 0.2 * without


def test_without_a_mean_nothing_is_corrected(gaussian):
    bias = gaussian(24)
    assert quantize_weight(gaussian(24, 64), "int8_tensorwise", bias=bias).bias is bias


def test_the_correction_can_be_turned_off(gaussian):
    bias = gaussian(24)
    known = quantize_weight(gaussian(24, 64), "int8_tensorwise", bias=bias, mean=torch.ones(64), bias_correction="none")
    assert known.bias is bias


def test_a_layer_without_a_bias_gets_none(gaussian):
    assert quantize_weight(gaussian(24, 64), "int8_tensorwise", mean=torch.ones(64)).bias is None


def test_the_note_names_a_synthetic_mean(gaussian, sentences):
    made = quantize_weight(gaussian(24, 64), "int8_tensorwise", bias=gaussian(24), bias_correction="synthetic")
    sentences(made.note)


def test_the_synthetic_mean_follows_the_seed_and_tends_to_zero(gaussian):
    weight, bias = gaussian(24, 64), gaussian(24)
    options = {"bias": bias, "bias_correction": "synthetic", "seed": 1}
    first, again, many = (
        quantize_weight(weight, "int8_tensorwise", **options, calib_samples=count).bias for count in (4, 4, 4000)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, bias)
    assert (many - bias).norm() < 0.2 * (first - bias).norm()


def test_the_synthetic_mean_is_that_of_draws(gaussian):
    mean = synthetic_mean(3, 2, 5, torch.device("cpu"))
    draws = torch.randn(2, 3, generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close(mean, draws.mean(dim=0))


def test_the_bias_keeps_its_dtype(gaussian):
    bias = gaussian(24).to(torch.float16)
    assert quantize_weight(gaussian(24, 64), "int8_tensorwise", bias=bias, mean=torch.ones(64)).bias.dtype is bias.dtype


def test_a_mean_that_does_not_fit_is_refused(subtests, gaussian, sentences):
    for name, mean in (
        ("channels", torch.ones(63)),
        ("matrix", torch.ones(1, 64)),
        ("NaN", torch.full((64,), float("nan"))),
    ):
        with subtests.test(name), sentences.raises(CalibrationError):
            quantize_weight(gaussian(24, 64), "int8_tensorwise", bias=gaussian(24), mean=mean)
