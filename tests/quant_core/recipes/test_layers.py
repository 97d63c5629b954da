"""Rules for single layers: which one decides, what it makes of a layer, and what is refused."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from learned_rounding.quant_core import Recipe, quantize_file, quantize_tensors
from learned_rounding.quant_core.errors import RecipeError
from learned_rounding.quant_core.formats import FormatConfig
from learned_rounding.quant_core.formats.layer_json import layer_configs
from learned_rounding.quant_core.output import verify_file
from learned_rounding.quant_core.recipes import layers, make_plan
from learned_rounding.quant_core.recipes.layers import (
    LayerRule,
    Pattern,
    find_rules,
    most_specific,
    parse_layer_config,
    parse_rules,
)
from learned_rounding.quant_core.sources import SafetensorsFile

INT8 = FormatConfig("int8_tensorwise")


@pytest.mark.parametrize(
    "patterns, name, decides",
    [
        (["mlp", "blocks"], "blocks.0.mlp.weight", "blocks"),  # the longer one
        (["blocks", "mlp"], "blocks.0.mlp.weight", "blocks"),
        (["blocks.*mlp", "blocks.0.mlp"], "blocks.0.mlp.weight", "blocks.0.mlp"),  # the layer's own name
        (["a very long pattern that finds nothing", "mlp"], "blocks.0.mlp.weight", "mlp"),
        (["mlp", "m.p"], "blocks.0.mlp.weight", "m.p"),  # as long: the last
        (["attn"], "blocks.0.mlp.weight", None),
    ],
)
def test_the_most_specific_rule_decides(patterns, name, decides):
    rule = most_specific(
        find_rules([LayerRule(pattern, INT8, "layer config") for pattern in patterns], [name])[name], name
    )
    assert (rule and rule.pattern) == decides


@pytest.mark.parametrize(
    "keep, config, kept", [("mlp", "mlp", True), ("m.p", "mlp", True), ("mlp", "mlp.0", False), ("blocks", "mlp", True)]
)
def test_of_rules_as_specific_the_one_that_keeps_a_layer_decides(keep, config, kept):
    rules, name = parse_rules([keep], f'{{"{config}": "int8"}}'), "blocks.0.mlp.0.weight"
    for order in (rules, rules[::-1]):
        assert (most_specific(find_rules(order, [name])[name], name).format is None) is kept


@pytest.mark.parametrize(
    "value, choice",
    [
        ("skip", None),
        ({"skip": True}, None),
        ("fp8", FormatConfig("float8_e4m3fn")),
        ("int8", FormatConfig("int8_tensorwise", convrot=True)),
        ({"format": "int8", "convrot": False}, INT8),
        ({"format": "int8_tensorwise"}, INT8),
        ("int8_blockwise", FormatConfig("int8_blockwise")),
        ({"format": "int8", "convrot": True}, FormatConfig("int8_tensorwise", convrot=True)),
        ({"format": "int8", "granularity": "block", "block_size": 64}, FormatConfig("int8_blockwise", "block", 64)),
        ({"format": "fp8", "granularity": "row"}, FormatConfig("float8_e4m3fn_rowwise", "row")),
        (
            {"format": "fp8", "full_precision_matrix_mult": True},
            FormatConfig("float8_e4m3fn", full_precision_matmul=True),
        ),
    ],
)
def test_what_a_rule_says(value, choice):
    (rule,) = parse_layer_config(json.dumps({"x": value}))
    assert rule.format == choice and rule.reason == "layer config x"


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[1]",
        pytest.param("[" * 100_000, id="deep"),
        '{"x": 3}',
        '{"x": {"skip": false}}',
        '{"x": {"convrot": true}}',
        '{"x": "int9"}',
        '{"x": "measured"}',
        '{"x": {"format": 8}}',
        '{"x": {"format": "int8", "granularity": [1]}}',
        '{"x": {"format": "int8", "blocksize": 64}}',
        '{"x": {"format": "int8", "block_size": "64"}}',
        '{"x": {"format": "int8", "block_size": true}}',
        '{"x": {"format": "int8", "block_size": 64}}',
        '{"x": {"format": "fp8", "convrot": true}}',
        '{"x": {"format": "int8", "full_precision_matrix_mult": true}}',
        '{"(": "int8"}',
    ],
)
def test_what_is_refused(text, sentences):
    with sentences.raises(RecipeError):
        Recipe(layer_config=text)


def test_rules_may_be_many_but_not_large_together(sentences):
    assert (
        len(
            Recipe(
                layer_config=json.dumps({f"model.double_blocks.{index}.img_attn.qkv": "int8" for index in range(1500)})
            ).rules
        )
        == 1500
    )
    with sentences.raises(RecipeError):
        Recipe(layer_config=json.dumps({f"a{{48}}[b{index}]": "int8" for index in range(420)}))
    with sentences.raises(RecipeError):
        Recipe(keep=("a",) * 200_001)


def test_a_plan_makes_each_pattern_once_and_asks_whether_to_go_on(header_source, monkeypatch):
    """However many rules and layers there are."""
    source = header_source({f"blocks.{index}.weight": (64, 64) for index in range(10)})
    rules = parse_rules((), json.dumps({rf"^blocks\.{index}\.": "int8" for index in range(300)}))
    made, asked = [], []
    monkeypatch.setattr(layers, "Pattern", lambda text: made.append(text) or Pattern(text))
    plan = make_plan(source, preset="none", rules=rules, check=lambda: asked.append(1))
    assert len(made) == 300 and len(asked) == 300 + 10  # of rules and tensors
    assert [plan.decisions[f"blocks.{index}.weight"].reason for index in (0, 9)] == [
        rules[0].reason,
        rules[9].reason,
    ] and len(plan.idle) == 290

    def stop():
        raise KeyboardInterrupt

    tensors = {"a.weight": torch.zeros(32, 32)}
    for run in (
        lambda: make_plan(source, rules=rules, check=stop),
        lambda: quantize_tensors(tensors, Recipe(keep=("a",)), device="cpu", check=stop),
    ):
        with pytest.raises(KeyboardInterrupt):
            run()


def test_measured_formats_leave_no_room_for_rules(sentences):
    with sentences.raises(RecipeError):
        Recipe(format="measured", layer_config='{"x": "int8"}')


def test_rules_come_before_preset_and_heuristics(layer_names, header_source):
    source = header_source(layer_names("flux"))
    recipe = Recipe(heur=True, keep=("img_mlp",), layer_config='{"^img_in": "int8", "img_mlp.0": "fp8"}')
    plan = recipe.plan(source)
    decisions = plan.decisions
    assert plan.preset.name == "flux" and decisions["txt_in.weight"].action == "keep"
    assert (
        decisions["img_in.weight"].action == "quantize" and decisions["img_in.weight"].reason == "layer config ^img_in"
    )
    assert decisions["double_blocks.0.img_mlp.2.weight"].reason == "keep pattern img_mlp"
    assert decisions["double_blocks.0.img_mlp.0.weight"].format == FormatConfig("float8_e4m3fn")
    assert decisions["img_in.bias"].action == "keep"  # no rule makes a bias a matrix


def test_a_file_of_rules_is_sound(tmp_path):
    generator = torch.Generator().manual_seed(0)
    names = ["a.qkv", "a.mlp", "b.qkv", "b.mlp"]
    tensors = {f"{name}.weight": torch.randn(64, 64, generator=generator).bfloat16() for name in names}
    save_file(tensors, tmp_path / "model.safetensors")
    config = {
        "mlp": {"format": "int8", "convrot": 16},
        "b.mlp": "skip",
        "a.qkv": {"format": "fp8", "granularity": "block", "block_size": 32},
    }
    recipe = Recipe(rounding="nearest", full_precision_matmul=True, layer_config=json.dumps(config))
    quantize_file(tmp_path / "model.safetensors", tmp_path / "q.safetensors", recipe)
    assert verify_file(tmp_path / "q.safetensors").problems == []
    with SafetensorsFile(tmp_path / "q.safetensors") as opened:
        found = layer_configs(opened)[0]
    assert {layer: entry["format"] for layer, entry in found.items()} == {
        "a.qkv": "float8_e4m3fn_blockwise",
        "a.mlp": "int8_tensorwise",
        "b.qkv": "float8_e4m3fn",
    }
    assert found["a.qkv"]["group_size"] == 32 and found["a.mlp"]["convrot_groupsize"] == 16
    assert found["b.qkv"]["full_precision_matrix_mult"] and "full_precision_matrix_mult" not in found["a.mlp"]
    assert torch.equal(load_file(tmp_path / "q.safetensors")["b.mlp.weight"], tensors["b.mlp.weight"])


def test_rules_survive_json_and_toml():
    recipe = Recipe(layer_config='{"a\\\\.b": {"format": "int8", "convrot": true}}')
    assert Recipe.from_json(recipe.to_json()) == Recipe.from_toml(recipe.to_toml()) == recipe
    assert parse_rules(recipe.keep, recipe.layer_config) == recipe.rules
