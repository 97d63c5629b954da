"""Benchmark of image formats without ComfyUI: its recipes and the bits per weight."""

import re

import pytest
import torch
from safetensors.torch import save_file

from learned_rounding.benchmarks.tiny_formats import BELOW_8_BITS, FORMATS, LAYERS, bits_per_weight
from learned_rounding.benchmarks.tiny_model.graph import MODEL
from learned_rounding.benchmarks.tiny_model.place import ASSETS
from learned_rounding.quant_core import Recipe, quantize_file
from learned_rounding.quant_core.sources import SafetensorsFile


def test_bits_count_quantized_layers_with_their_scales(tmp_path):
    source, target = tmp_path / "model.safetensors", tmp_path / "quantized.safetensors"
    save_file({"blocks.3.mlp.weight": torch.randn(256, 256), "norm.weight": torch.ones(256)}, source)
    quantize_file(source, target, Recipe(format="int8_tensorwise", convrot=None, rounding="nearest"), general=True)
    assert bits_per_weight(target) == pytest.approx(8 + 32 / 256, abs=0.05)


@pytest.mark.parametrize("name", BELOW_8_BITS)
def test_all_layers_of_the_blocks_are_in_the_format(name):
    options = FORMATS[f"{name}, all layers"]
    with SafetensorsFile(ASSETS / MODEL) as source:
        decisions = Recipe(**options, rounding="calibrated").plan(source).decisions
    layers = [entry for name, entry in decisions.items() if re.search(LAYERS, name) and entry.action == "quantize"]
    assert len(layers) == 29
    assert {decision.format and decision.format.name for decision in layers} == {options["format"]}
