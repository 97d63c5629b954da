"""Layers of this pack for formats that a host cannot run."""

import pytest
import torch

from learned_rounding.quant_core import FORMATS, Recipe, quantize_tensors
from learned_rounding.quant_core.formats.layer_json import config_tensor
from learned_rounding.tests.in_comfyui import IN_COMFYUI
from learned_rounding.tests.nodes.probing import stock_loads

if IN_COMFYUI:
    from learned_rounding.nodes import host as pack
    from learned_rounding.tests.nodes.host.tiny_model import TinyModel, distance

pytestmark = pytest.mark.usefixtures("in_comfyui")

# Relative error of the tiny model's prediction for random inputs; round to nearest.
BOUND = 0.2
RECIPES = {name: {"format": name} for name in FORMATS} | {
    "asym_w4a8_int8 6 bits": {"format": "asym_w4a8_int8", "bits": 6}  # not expanded without add_layouts
}


def test_decoding_layers_support_loras_and_low_vram(host, subtests):
    tiny = TinyModel()
    expected, expected_lora = tiny.run(tiny.original), tiny.run(tiny.with_lora(tiny.original))
    found = set()
    for name, recipe in RECIPES.items():
        if name in FORMATS and pack.supports_format(name):
            continue
        quantized = tiny.file(**recipe)
        described = pack.describe_formats(quantized.files[""])
        if "decoded as they run: " not in described:
            continue  # a newer comfy-kitchen has 6 bits
        found.add(name)
        model = pack.build_model(tiny.original, quantized)
        layers = [module for module in model.model.modules() if getattr(module, "is_quantized", False)]
        before = tiny.run(model)
        with subtests.test(name):
            format = recipe["format"]
            assert format in described
            assert format in {layer.codec.format.name for layer in layers}
            assert {layer.codec.format.name for layer in layers} <= {format, "int8_tensorwise"}
            assert [layer for layer in layers if layer.weight.dtype is not layer.codec.format.storage_dtype] == []
            norms = [value for key, value in model.model.named_parameters() if key.endswith("norm.weight")]
            assert {norm.dtype for norm in norms} <= {torch.float32}
            assert 0 < distance(before, expected) < BOUND
        with subtests.test(f"{name} with a LoRA"):
            ours = tiny.with_lora(model)
            whole = tiny.run(ours)
            assert distance(whole, expected_lora) < BOUND
            assert distance(whole, expected_lora) < distance(expected_lora, expected)
            assert distance(tiny.run(ours, lowvram_model_memory=1), whole) < 1e-5
            assert torch.equal(tiny.run(model), before)
    assert {name for name in FORMATS if not stock_loads(host, name)} <= found | {"int8_tensorwise"}
    if host.version in ("0.3.75", "0.33.0"):
        assert "asym_w4a8_int8 6 bits" in found


def test_rotation_below_params_is_read_as_in_comfyui():
    """By ComfyUI's own layer where it supports the format, else by a decoding layer."""
    generator = torch.Generator().manual_seed(0)
    weight, inputs = torch.randn(64, 64, generator=generator), torch.randn(8, 64, generator=generator)
    recipe = Recipe(format="int8_tensorwise", convrot=64, rounding="nearest")
    made = quantize_tensors({"a.weight": weight}, recipe).tensors
    config = {"format": "int8_tensorwise", "per_row": True, "params": {"convrot": True, "convrot_groupsize": 64}}
    tensors = {name.removeprefix("a."): tensor for name, tensor in made.items()}
    linear = pack.decoding.make_quantized_linear("a", tensors | {"comfy_quant": config_tensor(config)}, config)
    assert distance(linear(inputs), inputs @ weight.T) < 0.05
