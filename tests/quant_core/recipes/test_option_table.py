"""The option table covers every field of a recipe and describes the formats that each option applies to."""

import dataclasses

import pytest

from learned_rounding.quant_core import FORMATS, Recipe
from learned_rounding.quant_core.cli.parser import make_parser
from learned_rounding.quant_core.errors import RecipeError
from learned_rounding.quant_core.formats import FormatConfig
from learned_rounding.quant_core.recipes import FORMAT_ALIASES, OPTION_TABLE
from learned_rounding.quant_core.recipes.option_table import CONVROT, FORMAT_OPTIONS

TABLE = {name: option for options in OPTION_TABLE.values() for name, option in options.items()}


def test_every_field_of_a_recipe_is_in_the_table():
    assert set(TABLE) == {
        *Recipe().to_dict(),
        "bits",
        "linear_dtype",
        "card",
        "target_time",
        "smoothing",
        "beam_width",
    }  # these are written where they are given
    assert sum(map(len, OPTION_TABLE.values())) == len(TABLE)


@pytest.mark.parametrize("name", TABLE)
def test_every_option_has_help_and_an_lrq_option(name):
    option = TABLE[name]
    assert option.help and not option.help.endswith(".")
    (commands,) = (action.choices for action in make_parser()._actions if getattr(action, "choices", None))
    for flag in option.flags or (f"--{name}",):
        assert all(flag in commands[command]._option_string_actions for command in ("quantize", "plan"))


def test_defaults_are_those_of_the_recipe():
    for name in ("format", "preset", "rounding", "seed", "heur", "layer_config", "block_formats"):
        assert TABLE[name].default == Recipe().to_dict()[name]


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(
    "option, value",
    [("block_size", 64), ("convrot", True), ("full_precision_matmul", True)],
    ids=lambda each: str(each),
)
def test_an_option_is_accepted_by_the_formats_it_applies_to(name, option, value):
    for granularity in FORMATS[name].granularities:
        if FORMAT_OPTIONS[option].applies(FormatConfig(name, granularity).codec):
            assert getattr(FormatConfig(name, granularity, **{option: value}), option) == value
            assert name in FORMAT_OPTIONS[option].scope
        elif FORMATS[name].full_precision_matmul != "always":
            with pytest.raises(RecipeError):
                FormatConfig(name, granularity, **{option: value})


def test_formats_are_offered_with_the_aliases():
    choices = FORMAT_OPTIONS["format"].choices
    assert set(choices) == {
        *FORMATS,
        "auto",
        "measured",
        *FORMAT_ALIASES,
    }
    assert CONVROT["off"] is False and CONVROT["on"] is True


def test_options_that_act_on_format_measured_alone():
    own = {name for name, option in FORMAT_OPTIONS.items() if getattr(option, "applies", bool)(None)}
    assert own == {"target_size", "target_error", "block_formats", "card", "target_time"}
    assert own < {field.name for field in dataclasses.fields(Recipe)}
