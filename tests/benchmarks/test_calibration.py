"""Calibration benchmark without ComfyUI: dequantized files and the bootstrap interval."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from learned_rounding.benchmarks.calibration import FORMATS, decode_file, ratio_interval
from learned_rounding.quant_core import Recipe, quantize_file, quantize_weight


@pytest.mark.parametrize("name", FORMATS)
def test_dequantized_file_has_the_weights_of_the_quantized_file(tmp_path, name):
    choices = {**FORMATS[name], "convrot": "convrot" in FORMATS[name]}
    weight = torch.randn(256, 256, generator=torch.Generator().manual_seed(0)).bfloat16()
    source = {"layer.weight": weight, "layer.bias": weight[0].clone(), "norm.weight": weight[1].clone()}
    save_file(source, tmp_path / "model.safetensors")
    quantize_file(
        tmp_path / "model.safetensors", tmp_path / "quantized.safetensors", Recipe(rounding="nearest", **choices)
    )
    assert decode_file(tmp_path / "quantized.safetensors", tmp_path / "dequantized.safetensors") == 1
    dequantized = load_file(tmp_path / "dequantized.safetensors")
    assert dequantized.keys() == source.keys()
    assert {tensor.dtype for tensor in dequantized.values()} == {torch.float32}
    assert torch.equal(dequantized["layer.bias"], weight[0].float())
    error = quantize_weight(weight, rounding="nearest", **choices).weight_error
    measured = float((dequantized["layer.weight"] - weight.float()).norm() / weight.float().norm())
    assert measured == pytest.approx(error, rel=1e-3)
    assert 0 < error < 0.05


def test_interval_draws_prompts_with_all_their_seeds():
    base = np.exp(np.random.default_rng(1).normal(size=(4, 8)))
    assert ratio_interval(base / 2, base) == pytest.approx((0.5, 0.5, 0.5))
    factors = np.tile(np.exp(np.linspace(-1, 1, 8)), (4, 1))  # one factor per prompt, equal for all seeds
    middle, low, high = ratio_interval(base * factors, base)
    assert middle == pytest.approx(1)
    assert low == pytest.approx(1 / high, rel=0.05)
    assert 1.3 < high < 1.8  # log(high) = 1.96 × 0.65 / √8; with independent images it would be smaller by √4
