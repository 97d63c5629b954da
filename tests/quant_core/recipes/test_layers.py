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
from learned_rounding.quant_core.recipes.patterns import LARGEST
from learned_rounding.quant_core.sources import SafetensorsFile

INT8 = FormatConfig("int8_tensorwise")

# The most specific rule


def decisive(rules, name: str) -> LayerRule | None:
    return most_specific(find_rules(rules, [name])[name], name)


def test_the_most_specific_rule_decides(subtests):
    name = "blocks.0.mlp.weight"
    for patterns, decides in [
        (["mlp", "blocks"], "blocks"),  # the longer one
        (["blocks", "mlp"], "blocks"),
        (["blocks.*mlp", "blocks.0.mlp"], "blocks.0.mlp"),  # the layer's own name
        (["blocks.*mlp.*weight", name], name),
        (["a very long pattern that finds nothing", "mlp"], "mlp"),
        (["mlp", "m.p"], "m.p"),  # as long: the last
    ]:
        with subtests.test(str(patterns)):
            assert decisive([LayerRule(pattern, INT8, "layer config") for pattern in patterns], name).pattern == decides


def test_no_rule_decides_where_none_is_found():
    assert decisive([LayerRule("attn", INT8, "layer config")], "blocks.0.mlp.weight") is None


def test_of_rules_as_specific_the_one_that_keeps_a_layer_decides(subtests):
    for keep, config, kept in [
        ("mlp", "mlp", True),
        ("m.p", "mlp", True),
        ("mlp", "mlp.0", False),
        ("blocks", "mlp", True),
    ]:
        with subtests.test(keep=keep, config=config, kept=kept):
            rules = parse_rules([keep], f'{{"{config}": "int8"}}')
            for order in (rules, rules[::-1]):
                assert (decisive(order, "blocks.0.mlp.0.weight").format is None) is kept


def test_rules_keep_their_order_for_each_name():
    rules = parse_rules(["b", "a", "nothing"], "")
    found = find_rules(rules, ["ab", "b"])
    assert {name: [rule.pattern for rule in found[name]] for name in found} == {"ab": ["b", "a"], "b": ["b"]}


# Layer configs


def test_what_a_rule_says(subtests):
    for value, choice in [
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
    ]:
        with subtests.test(str(value)):
            (rule,) = parse_layer_config(json.dumps({"x": value}))
            assert rule.format == choice


def test_the_reason_of_a_rule_has_its_origin_and_pattern():
    assert parse_rules(["a"], '{"x": "int8"}')[0].reason == "keep pattern a"
    assert parse_rules(["a"], '{"x": "int8"}')[1].reason == "layer config x"


def test_a_blank_layer_config_has_no_rules():
    assert parse_layer_config(" \n") == ()


REFUSED = [
    "{",
    "[1]",
    "[" * 100_000,
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
]


def test_what_is_refused(subtests, sentences):
    for text in REFUSED:
        with subtests.test(text[:80]), sentences.raises(RecipeError):
            parse_rules((), text)


# Limits


def test_rules_may_be_many():
    config = json.dumps({f"model.double_blocks.{index}.img_attn.qkv": "int8" for index in range(1500)})
    assert len(parse_rules((), config)) == 1500


def test_rules_may_not_be_large_together(sentences):
    with sentences.raises(RecipeError):
        parse_rules((), json.dumps({f"a{{48}}[b{index}]": "int8" for index in range(420)}))


def test_many_short_patterns_are_refused(subtests, sentences):
    for kind, keep in {"equal": ("a",) * (LARGEST + 1), "different": map(str, range(LARGEST))}.items():
        with subtests.test(kind), sentences.raises(RecipeError):
            parse_rules(keep, "")


@pytest.fixture
def counted_plan(header_source, monkeypatch):
    """(plan of ten layers with 300 rules, rules, patterns that were made, calls of check)"""
    source = header_source({f"blocks.{index}.weight": (64, 64) for index in range(10)})
    rules = parse_rules((), json.dumps({rf"^blocks\.{index}\.": "int8" for index in range(300)}))
    made, asked = [], []
    monkeypatch.setattr(layers, "Pattern", lambda text: made.append(text) or Pattern(text))
    return make_plan(source, preset="none", rules=rules, check=lambda: asked.append(1)), rules, made, asked


def test_a_plan_makes_each_pattern_once(counted_plan):
    _, rules, made, _ = counted_plan
    assert len(made) == len(rules)


def test_a_plan_asks_whether_to_go_on_at_each_rule_and_tensor(counted_plan):
    plan, rules, _, asked = counted_plan
    assert len(asked) == len(rules) + len(plan.decisions)


def test_each_layer_has_its_own_rule_among_many(counted_plan):
    plan, rules, *_ = counted_plan
    assert [decision.reason for decision in plan.decisions.values()] == [rule.reason for rule in rules[:10]]


def test_rules_that_find_nothing_among_many_are_idle(counted_plan):
    plan, rules, *_ = counted_plan
    assert plan.idle == rules[10:]


def stop():
    raise KeyboardInterrupt


def test_a_plan_with_rules_can_be_cancelled(header_source):
    with pytest.raises(KeyboardInterrupt):
        make_plan(header_source({"a.weight": (64, 64)}), rules=parse_rules(("a",), ""), check=stop)


def test_a_run_with_rules_can_be_cancelled():
    with pytest.raises(KeyboardInterrupt):
        quantize_tensors({"a.weight": torch.zeros(32, 32)}, Recipe(keep=("a",)), device="cpu", check=stop)


# Files


LAYERS = ["a.qkv", "a.mlp", "b.qkv", "b.mlp"]


@pytest.fixture(scope="module")
def ruled_file(tmp_path_factory):
    """(tensors, path of the quantized file, JSON of its layers) of a run with a rule for some layers."""
    folder = tmp_path_factory.mktemp("rules")
    generator = torch.Generator().manual_seed(0)
    tensors = {f"{name}.weight": torch.randn(64, 64, generator=generator).bfloat16() for name in LAYERS}
    save_file(tensors, folder / "model.safetensors")
    config = {
        "mlp": {"format": "int8", "convrot": 16},
        "b.mlp": "skip",
        "a.qkv": {"format": "fp8", "granularity": "block", "block_size": 32},
    }
    recipe = Recipe(rounding="nearest", full_precision_matmul=True, layer_config=json.dumps(config))
    quantize_file(folder / "model.safetensors", folder / "q.safetensors", recipe)
    with SafetensorsFile(folder / "q.safetensors") as opened:
        return tensors, folder / "q.safetensors", layer_configs(opened)[0]


def test_a_file_with_rules_is_valid(ruled_file):
    assert verify_file(ruled_file[1]).problems == []


def test_layers_of_a_file_have_the_formats_of_their_rules(ruled_file):
    assert {layer: entry["format"] for layer, entry in ruled_file[2].items()} == {
        "a.qkv": "float8_e4m3fn_blockwise",
        "a.mlp": "int8_tensorwise",
        "b.qkv": "float8_e4m3fn",
    }


def test_layers_of_a_file_have_the_options_of_their_rules(ruled_file):
    assert ruled_file[2]["a.qkv"]["group_size"] == 32
    assert ruled_file[2]["a.mlp"]["convrot_groupsize"] == 16


def test_options_of_the_recipe_are_for_layers_without_a_rule(ruled_file):
    assert [layer for layer, entry in ruled_file[2].items() if "full_precision_matrix_mult" in entry] == ["b.qkv"]


def test_a_skipped_layer_is_copied(ruled_file):
    tensors, path, _ = ruled_file
    assert torch.equal(load_file(path)["b.mlp.weight"], tensors["b.mlp.weight"])


def test_rules_of_a_recipe_are_those_of_its_fields():
    recipe = Recipe(keep=("a",), layer_config='{"a\\\\.b": {"format": "int8", "convrot": true}}')
    assert recipe.rules == parse_rules(recipe.keep, recipe.layer_config)
