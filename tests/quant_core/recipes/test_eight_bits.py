"""Layers that take INT8 in a recipe of fewer bits."""

import math
from types import SimpleNamespace

import pytest
import torch

from learned_rounding.quant_core import FORMATS, Recipe, quantize_tensors
from learned_rounding.quant_core.formats import make_codec
from learned_rounding.quant_core.recipes.eight_bits import EIGHT_BITS, describe_uncalibrated
from learned_rounding.quant_core.sources import TensorInfo
from learned_rounding.tests.architectures.table import source

FEW_BITS = [
    name for name in FORMATS if make_codec(name, convrot=256 if FORMATS[name].rotated else None).weight_bits < 8
]


def header(shapes: dict[str, tuple[int, ...]]) -> SimpleNamespace:
    infos = {name: TensorInfo(torch.bfloat16, shape) for name, shape in shapes.items()}
    return SimpleNamespace(name="model", tensors=infos, metadata={})


def blocks(count: int, width: int = 64) -> dict[str, tuple[int, ...]]:
    shapes = {"img_in.weight": (width, width)}
    for block in range(count):
        start = f"blocks.{block}"
        shapes |= {
            f"{start}.qkv.weight": (3 * width, width),
            f"{start}.mlp.up.weight": (4 * width, width),
            f"{start}.mlp.down.weight": (width, 4 * width),
            f"{start}.img_mod.lin.weight": (6 * width, width),
        }
    return shapes


def fallbacks(plan) -> set[str]:
    assert all(decision.format == EIGHT_BITS for decision in plan.decisions.values() if decision.fallback)
    return {name for name, decision in plan.decisions.items() if decision.fallback}


def test_formats_of_four_and_six_bits_are_those_of_fewer_bits():
    assert set(FEW_BITS) == {"nvfp4", "asym_w4a8_int8", "convrot_w4a4"}
    assert make_codec("asym_w4a8_int8", bits=6, convrot=256).weight_bits == 6


@pytest.mark.parametrize("format", [*FEW_BITS, "w6a8"])
def test_sensitive_layers_take_eight_bits(format):
    plan = Recipe(format=format, preset="none").plan(header(blocks(6)))
    quantized = set(plan.names("quantize"))
    four = {f"blocks.{block}.{layer}.weight" for block in range(1, 5) for layer in ("qkv", "mlp.up")}
    assert fallbacks(plan) == quantized - four and len(four & quantized) == 8


@pytest.mark.parametrize("format", [name for name in FORMATS if name not in FEW_BITS])
def test_formats_of_eight_bits_take_all_layers(format):
    assert not fallbacks(Recipe(format=format, preset="none").plan(header(blocks(6))))


def test_a_rule_of_the_user_decides_before_the_list():
    recipe = Recipe(format="w4a8", preset="none", layer_config='{"mlp.down": "w4a8", "qkv": "fp8"}')
    plan = recipe.plan(header(blocks(6)))
    assert all(plan.decisions[f"blocks.{block}.mlp.down.weight"].format.name == "asym_w4a8_int8" for block in range(6))
    assert all(plan.decisions[f"blocks.{block}.qkv.weight"].format.name == "float8_e4m3fn" for block in range(6))
    assert "blocks.0.mlp.up.weight" in fallbacks(plan)


@pytest.mark.parametrize(
    "format, channels, held", [("w4a8", 80, True), ("w4a8", 72, False), ("w6a8", 80, False), ("w4a4", 80, False)]
)
def test_a_shape_that_the_format_cannot_hold_takes_eight_bits_with_the_reason(format, channels, held, sentences):
    shapes = {f"blocks.{block}.attn.{name}.weight": (96, channels) for block in range(6) for name in ("q", "k")}
    plan = Recipe(format=format, preset="none").plan(header(shapes))
    inner = [name for name in shapes if ".0." not in name and ".5." not in name]
    assert {name in fallbacks(plan) for name in inner} == {not held}
    sentences(sorted({plan.decisions[name].reason for name in inner}))


def test_a_rule_for_a_format_that_cannot_hold_the_layer_takes_eight_bits():
    plan = Recipe(preset="none", layer_config='{".": "w4a4"}').plan(
        header({"a.weight": (64, 96), "b.weight": (64, 128)})
    )
    assert fallbacks(plan) == {"a.weight"}


def test_the_file_and_the_report_say_which_layers_have_eight_bits():
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in blocks(6).items()}
    made = quantize_tensors(tensors, Recipe(format="w4a8", preset="none"))
    notes = {layer.name: layer.note for layer in made.report.layers}
    assert "first or last block" in notes["blocks.0.qkv.weight"] and not notes["blocks.1.qkv.weight"]
    assert made.tensors["blocks.0.qkv.weight"].shape == (192, 64)
    assert made.tensors["blocks.1.qkv.weight"].shape == (192, 32)
    assert any("without a calibration" in warning for warning in made.report.warnings)


def test_formats_of_four_bits_warn_without_a_calibration(sentences):
    assert describe_uncalibrated(Recipe(format="int8").format) is None
    assert describe_uncalibrated(Recipe(format="w6a8").format) is None
    sentences([describe_uncalibrated(Recipe(format=name).format) for name in sorted(FEW_BITS)])


@pytest.mark.parametrize("name", ["flux", "chroma", "qwen_image", "wan_t2v", "sd35_large", "hunyuan", "qwen3_4b"])
def test_layers_of_the_middle_blocks_keep_their_four_bits(name):
    header = source(name)
    plan = Recipe(format="w4a8").plan(header)
    sizes = {layer: math.prod(header.tensors[layer].shape) for layer in plan.names("quantize")}
    left = sum(size for layer, size in sizes.items() if not plan.decisions[layer].fallback)
    assert 0.35 < left / sum(sizes.values()) < 0.8


def test_a_rule_cannot_pack_a_layer_outside_the_blocks():
    """ComfyUI reads the channels of the latents from the shape of Flux's ``img_in``."""
    rule = Recipe(preset="none", layer_config='{"img_in": "w4a8", "blocks.1.qkv": "w4a8"}')
    decisions = rule.plan(header(blocks(6))).decisions
    assert decisions["img_in.weight"].format == EIGHT_BITS and "reads sizes" in decisions["img_in.weight"].reason
    assert decisions["blocks.1.qkv.weight"].format.codec.weight_bits == 4
