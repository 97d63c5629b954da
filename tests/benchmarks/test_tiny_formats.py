"""Benchmark of image formats without ComfyUI: recipes, bits per weight, metrics and prompts."""

import re

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from learned_rounding.benchmarks.tiny_formats import (
    BELOW_8_BITS,
    FORMATS,
    LAYERS,
    Images,
    bits_per_weight,
    calibration_prompts,
    family,
)
from learned_rounding.benchmarks.tiny_model.graph import MODEL
from learned_rounding.benchmarks.tiny_model.place import ASSETS, prompt_splits
from learned_rounding.quant_core import Recipe, quantize_file
from learned_rounding.quant_core.comparison import ssim
from learned_rounding.quant_core.sources import SafetensorsFile


def test_bits_count_quantized_layers_with_their_scales(tmp_path):
    source, target = tmp_path / "model.safetensors", tmp_path / "quantized.safetensors"
    save_file({"blocks.3.mlp.weight": torch.randn(256, 256), "norm.weight": torch.ones(256)}, source)
    quantize_file(source, target, Recipe(format="int8_tensorwise", convrot=None, rounding="nearest"), general=True)
    assert bits_per_weight(target) == pytest.approx(8 + 32 / 256, abs=0.05)


def test_all_layers_of_the_blocks_are_in_the_format(subtests):
    for format in BELOW_8_BITS:
        options = FORMATS[f"{format}, all layers"]
        with SafetensorsFile(ASSETS / MODEL) as source:
            decisions = Recipe(**options, rounding="calibrated").plan(source).decisions
        layers = [entry for name, entry in decisions.items() if re.search(LAYERS, name) and entry.action == "quantize"]
        with subtests.test(format):
            assert len(layers) == 29
            assert {decision.format and decision.format.name for decision in layers} == {options["format"]}


def test_prompts_of_the_images_are_in_no_calibration():
    splits = prompt_splits()
    images = [*splits["unseen"], *splits["evaluation"]][:32]
    found = calibration_prompts(images, 1000)
    assert len(found) == len(set(found)) == 96
    assert not {*images, *splits["unseen"]} & {*found}
    assert calibration_prompts(images, 50) == splits["calibration"][:48]


def test_variants_of_a_format_are_chosen_together():
    assert [name for name in FORMATS if family(name) == "w4a8"] == ["W4A8", "W4A8, all layers"]
    assert family("nvfp4, smoothed") == "nvfp4"
    assert family("INT8 per row, ConvRot") == "int8"


def test_metrics_match_their_definitions():
    generator = torch.Generator().manual_seed(0)
    expected, noise = (torch.randn(2, 2, 3, 16, 8, 8, generator=generator).numpy() for _ in range(2))
    images = torch.rand(2, 3, 64, 64, 3, generator=generator).double().numpy()
    found = Images(expected + 0.1 * noise, images * 0.9).compare(Images(expected, images))
    snr = 10 * np.log10((expected**2).sum(axis=(-3, -2, -1)) / (0.01 * noise**2).sum(axis=(-3, -2, -1)))
    assert found["SNR dB"] == pytest.approx(snr, rel=1e-4)
    assert found["latent error"] == pytest.approx(10 ** (-snr[-1] / 20), rel=1e-4)
    assert found["MSE"] == pytest.approx(0.01 * (images**2).mean(axis=(-3, -2, -1)))
    assert found["dB"] == pytest.approx(-10 * np.log10(found["MSE"]))
    assert found["SSIM"][1, 2] == pytest.approx(
        ssim(torch.from_numpy(images[1, 2:]), torch.from_numpy(0.9 * images[1, 2:]))
    )
