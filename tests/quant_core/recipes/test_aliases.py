"""Short format names mean the same in recipes, layer configs, lrq and the nodes, but for ConvRot of new recipes."""

from learned_rounding.quant_core import Recipe
from learned_rounding.quant_core.errors import RecipeError
from learned_rounding.quant_core.formats import FormatConfig
from learned_rounding.quant_core.recipes import aliases, make_format
from learned_rounding.quant_core.recipes.aliases import choose_format, find_format_name
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


def test_an_alias_is_a_format_configuration(subtests):
    for name, expected in EXPECTED.items():
        with subtests.test(name):
            assert make_format(name) == expected


def test_an_alias_is_the_same_in_a_layer_config(subtests):
    for name, expected in EXPECTED.items():
        with subtests.test(name):
            assert parse_layer_config(f'{{"x": "{name}"}}')[0].format == expected


def test_an_alias_is_the_same_in_a_recipe_file(subtests):
    for name, expected in EXPECTED.items():
        with subtests.test(name):
            assert Recipe.from_toml(f'format = "{name}"').format == expected


def test_an_alias_is_the_same_in_a_new_recipe_but_for_convrot(subtests):
    for name, expected in EXPECTED.items():
        with subtests.test(name):
            assert Recipe(format=name).format == (INT8_AUTO if name == "int8" else expected)


def test_given_options_override_those_of_an_alias(subtests):
    for options, expected in [
        ({"convrot": False}, FormatConfig("int8_tensorwise", "row")),
        ({"convrot": 16}, FormatConfig("int8_tensorwise", "row", convrot=16)),
        ({"granularity": "tensor"}, FormatConfig("int8_tensorwise", "tensor")),
        ({"granularity": "block", "block_size": 32}, FormatConfig("int8_blockwise", "block", 32)),
    ]:
        with subtests.test(options=options, expected=expected):
            assert make_format("int8", **options) == expected
            assert choose_format("int8", **options) == expected


def test_new_recipes_of_int8_per_row_have_convrot_auto(subtests):
    for name in ["int8", "int8_tensorwise"]:
        for options in [{}, {"granularity": "row"}]:
            with subtests.test(name=name, options=options):
                assert choose_format(name, **options) == INT8_AUTO


def test_new_recipes_of_int8_per_row_may_be_unrotated(subtests):
    for name in ["int8", "int8_tensorwise"]:
        with subtests.test(name=name):
            assert choose_format(name, convrot=False).convrot is None


def test_convrot_none_is_that_of_the_format_name(subtests):
    for name in ["int8", "int8_tensorwise"]:
        with subtests.test(name=name):
            assert choose_format(name, convrot=None) == make_format(name)


def test_new_recipes_of_int8_per_tensor_have_no_convrot():
    assert choose_format("int8", granularity="tensor").convrot is None


def test_new_recipes_of_other_formats_are_those_of_the_name(subtests):
    for name in ["fp8", "w4a8", "int8_blockwise", "measured"]:
        with subtests.test(name=name):
            assert choose_format(name) == make_format(name)


def test_a_sibling_is_chosen_where_it_is_asked_for():
    assert make_format("float8_e4m3fn", "row", sibling=True).name == "float8_e4m3fn_rowwise"


def test_format_names_are_exact(sentences):
    with sentences.raises(RecipeError):
        make_format("float8_e4m3fn", "row")


def test_adding_a_format_makes_its_alias_work(monkeypatch):
    monkeypatch.setattr(aliases, "FORMAT_ALIASES", {"e5m2": aliases.FormatAlias("float8_e5m2")})
    assert make_format("e5m2") == FormatConfig("float8_e5m2")


def test_other_spellings_of_format_names(subtests):
    for text, name in {"FP8": "fp8", "e4m3": "fp8", "float8-e5m2": "float8_e5m2", "int8-convrot": "int8"}.items():
        with subtests.test(text):
            assert find_format_name(text) == name


def test_an_unknown_format_name_is_only_normalized():
    assert find_format_name("No-Such") == "no_such"
