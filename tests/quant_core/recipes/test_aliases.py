"""Short format names mean the same in recipes, layer configs, lrq and the nodes, but for ConvRot of new recipes."""

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

INT8_AUTO = FormatConfig("int8_tensorwise", "row", convrot="auto")


@pytest.mark.parametrize("name", EXPECTED)
def test_an_alias_is_a_format_configuration_everywhere(name):
    assert make_format(name) == EXPECTED[name]
    assert Recipe(format=name).format == (INT8_AUTO if name == "int8" else EXPECTED[name])
    assert parse_layer_config(f'{{"x": "{name}"}}')[0].format == EXPECTED[name]
    assert Recipe.from_toml(f'format = "{name}"').format == EXPECTED[name]


@pytest.mark.parametrize(
    "options, expected",
    [
        ({"convrot": False}, FormatConfig("int8_tensorwise", "row")),
        ({"convrot": 16}, FormatConfig("int8_tensorwise", "row", convrot=16)),
        ({"granularity": "tensor"}, FormatConfig("int8_tensorwise", "tensor")),
        ({"granularity": "block", "block_size": 32}, FormatConfig("int8_blockwise", "block", 32)),
    ],
)
def test_given_options_override_those_of_an_alias(options, expected):
    assert make_format("int8", **options) == expected == Recipe(format="int8", **options).format


def test_new_recipes_of_int8_per_row_have_convrot_auto():
    for name in ("int8", "int8_tensorwise"):
        for options in ({}, {"granularity": "row"}):
            assert Recipe(format=name, **options).format == INT8_AUTO
        assert Recipe(format=name, convrot=False).format.convrot is None
        assert Recipe(format=name, convrot=None).format == make_format(name)
        assert Recipe(format=name, granularity="tensor").format.convrot is None
    for name in ("fp8", "w4a8", "int8_blockwise", "measured"):
        assert Recipe(format=name).format == make_format(name)


@pytest.mark.parametrize(
    "text, convrot",
    [
        ('format = "int8_tensorwise"', None),
        ('format = "int8_tensorwise"\ngranularity = "row"', None),
        ('format = "int8_tensorwise"\nconvrot = 64', 64),
        ('format = "int8"', True),
        ('format = "int8"\nconvrot = false', None),
        ('format = "int8"\nconvrot = "auto"', "auto"),
    ],
)
def test_recipe_files_keep_their_rotation(text, convrot):
    """A file of version 0.1.0 has no line for a rotation that is off."""
    recipe = Recipe.from_toml(text)
    assert recipe.format.convrot == convrot
    assert Recipe.from_toml(recipe.to_toml()) == recipe == Recipe.from_json(recipe.to_json())
    assert Recipe(**recipe.to_dict()) == recipe


def test_format_names_are_exact_unless_a_sibling_is_asked_for(sentences):
    assert make_format("float8_e4m3fn", "row", sibling=True).name == "float8_e4m3fn_rowwise"
    with sentences.raises(RecipeError):
        make_format("float8_e4m3fn", "row")


def test_adding_a_format_makes_its_alias_work(monkeypatch):
    monkeypatch.setattr(aliases, "FORMAT_ALIASES", {"e5m2": aliases.FormatAlias("float8_e5m2")})
    assert make_format("e5m2") == FormatConfig("float8_e5m2")
