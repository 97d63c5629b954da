"""Short format names mean the same in recipes, layer configs, lrq and the nodes."""

import pytest

from learned_rounding.quant_core import FORMATS, Recipe
from learned_rounding.quant_core.errors import RecipeError
from learned_rounding.quant_core.formats import FormatConfig
from learned_rounding.quant_core.recipes import FORMAT_ALIASES, aliases, make_format
from learned_rounding.quant_core.recipes.layers import parse_layer_config

EXPECTED = {
    "int8": FormatConfig("int8_tensorwise", "row", convrot=True),
    "fp8": FormatConfig("float8_e4m3fn", "tensor"),
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


def test_a_format_that_cannot_be_written_yet_is_refused_in_one_sentence(sentences):
    for name in [name for name, alias in FORMAT_ALIASES.items() if alias.format not in FORMATS]:
        with sentences.raises(RecipeError):
            Recipe(format=name)


def test_adding_a_format_makes_its_alias_work(monkeypatch, sentences):
    monkeypatch.setattr(aliases, "FORMAT_ALIASES", {"e5m2": aliases.FormatAlias("float8_e5m2")})
    monkeypatch.setattr(aliases, "FORMATS", {})
    with sentences.raises(RecipeError):
        make_format("e5m2")
    monkeypatch.setattr(aliases, "FORMATS", FORMATS)
    assert make_format("e5m2") == FormatConfig("float8_e5m2")
