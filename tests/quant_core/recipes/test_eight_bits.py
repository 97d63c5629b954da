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
    return {name for name, decision in plan.decisions.items() if decision.fallback}


def test_formats_of_fewer_bits():
    assert set(FEW_BITS) == {"nvfp4", "asym_w4a8_int8", "convrot_w4a4"}


def test_sensitive_layers_take_eight_bits(subtests):
    for format in [*FEW_BITS, "w6a8"]:
        with subtests.test(format=format):
            plan = Recipe(format=format, preset="none").plan(header(blocks(6)))
            few = {f"blocks.{block}.{layer}.weight" for block in range(1, 5) for layer in ("qkv", "mlp.up")}
            assert set(plan.names("quantize")) - fallbacks(plan) == few
            assert {plan.decisions[name].format for name in fallbacks(plan)} == {EIGHT_BITS}


def test_formats_of_eight_bits_take_all_layers(subtests):
    for format in FORMATS.keys() - set(FEW_BITS):
        with subtests.test(format):
            assert not fallbacks(Recipe(format=format, preset="none").plan(header(blocks(6))))


def test_a_rule_of_the_user_decides_before_the_list(subtests):
    for layer, format in [("mlp.down", "asym_w4a8_int8"), ("qkv", "float8_e4m3fn")]:
        with subtests.test(layer=layer, format=format):
            plan = Recipe(format="w4a8", preset="none", layer_config=f'{{"{layer}": "{format}"}}').plan(
                header(blocks(6))
            )
            assert {plan.decisions[f"blocks.{block}.{layer}.weight"].format.name for block in range(6)} == {format}
            assert "blocks.0.mlp.up.weight" in fallbacks(plan)


def test_a_shape_that_the_format_cannot_hold_takes_eight_bits_with_the_reason(subtests, sentences):
    for format, channels, held in [("w4a8", 80, True), ("w4a8", 72, False), ("w6a8", 80, False), ("w4a4", 80, False)]:
        with subtests.test(format=format, channels=channels, held=held):
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


@pytest.fixture(scope="module")
def w4a8():
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in blocks(6).items()}
    return quantize_tensors(tensors, Recipe(format="w4a8", preset="none"))


def test_the_file_has_layers_of_eight_bits_beside_those_of_four(w4a8):
    assert w4a8.tensors["blocks.0.qkv.weight"].shape == (192, 64)
    assert w4a8.tensors["blocks.1.qkv.weight"].shape == (192, 32)


def test_the_report_says_which_layers_have_eight_bits(w4a8):
    notes = {layer.name: layer.note for layer in w4a8.report.layers}
    assert "first or last block" in notes["blocks.0.qkv.weight"]
    assert not notes["blocks.1.qkv.weight"]


def test_the_report_warns_of_four_bits_without_a_calibration(w4a8):
    assert any("without a calibration" in warning for warning in w4a8.report.warnings)


def test_formats_of_four_bits_warn_without_a_calibration(sentences):
    sentences([describe_uncalibrated(Recipe(format=name).format) for name in sorted(FEW_BITS)])


def test_other_formats_do_not_warn_without_a_calibration(subtests):
    for format in ["int8", "w6a8", "measured"]:
        with subtests.test(format=format):
            assert describe_uncalibrated(Recipe(format=format).format) is None


def test_layers_of_the_middle_blocks_keep_their_four_bits(subtests):
    for name in ("flux", "chroma", "qwen_image", "wan_t2v", "sd35_large", "hunyuan", "qwen3_4b"):
        with subtests.test(name):
            header = source(name)
            plan = Recipe(format="w4a8").plan(header)
            sizes = {layer: math.prod(header.tensors[layer].shape) for layer in plan.names("quantize")}
            left = sum(size for layer, size in sizes.items() if not plan.decisions[layer].fallback)
            assert 0.35 < left / sum(sizes.values()) < 0.8


def test_a_rule_cannot_pack_a_layer_outside_the_blocks():
    """ComfyUI reads the channels of the latents from the shape of Flux's ``img_in``."""
    rule = Recipe(preset="none", layer_config='{"img_in": "w4a8"}')
    decision = rule.plan(header(blocks(6))).decisions["img_in.weight"]
    assert decision.format == EIGHT_BITS
    assert "reads sizes" in decision.reason


def test_a_rule_packs_a_layer_of_a_block():
    rule = Recipe(preset="none", layer_config='{"blocks.1.qkv": "w4a8"}')
    assert rule.plan(header(blocks(6))).decisions["blocks.1.qkv.weight"].format.codec.weight_bits == 4
