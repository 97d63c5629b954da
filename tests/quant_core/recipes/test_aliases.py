"""Short format names mean the same in recipes, layer configs, lrq and the nodes."""

import pytest

from learned_rounding.quant_core import Recipe
from learned_rounding.quant_core.errors import RecipeError
from learned_rounding.quant_core.formats import FormatConfig
from learned_rounding.quant_core.recipes import aliases, make_format
from learned_rounding.quant_core.recipes.layers import parse_layer_config

EXPECTED = {
    "int8": FormatConfig("int8_tensorwise", "row", convrot=True),
    "fp8": FormatConfig("float8_e4m3fn", "tensor"),
    "w4a8": FormatConfig("asym_w4a8_int8"),
    "int4": FormatConfig("asym_w4a8_int8", bits=4),
    "w6a8": FormatConfig("asym_w4a8_int8", bits=6),
    "w4a4": FormatConfig("convrot_w4a4", convrot=True, linear_dtype="int8"),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_an_alias_is_a_format_configuration_everywhere(name):
    assert make_format(name) == Recipe(format=name).format == EXPECTED[name]
    assert parse_layer_config(f'{{"x": "{name}"}}')[0].format == EXPECTED[name]
    assert Recipe.from_toml(f'format = "{name}"').format == EXPECTED[name]


@pytest.mark.parametrize(
    "options, expected",
    [
        ({"convrot": False}, FormatConfig("int8_tensorwise", "row")),
        ({"convrot": 16}, FormatConfig("int8_tensorwise", "row", convrot=16)),
        ({"granularity": "row"}, FormatConfig("int8_tensorwise", "row", convrot=True)),
        ({"granularity": "tensor"}, FormatConfig("int8_tensorwise", "tensor")),
        ({"granularity": "block", "block_size": 32}, FormatConfig("int8_blockwise", "block", 32)),
    ],
)
def test_given_options_override_those_of_an_alias(options, expected):
    assert make_format("int8", **options) == expected == Recipe(format="int8", **options).format


def test_format_names_are_exact_unless_a_sibling_is_asked_for(sentences):
    assert make_format("float8_e4m3fn", "row", sibling=True).name == "float8_e4m3fn_rowwise"
    with sentences.raises(RecipeError):
        make_format("float8_e4m3fn", "row")


def test_adding_a_format_makes_its_alias_work(monkeypatch):
    monkeypatch.setattr(aliases, "FORMAT_ALIASES", {"e5m2": aliases.FormatAlias("float8_e5m2")})
    assert make_format("e5m2") == FormatConfig("float8_e5m2")
