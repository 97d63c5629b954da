"""The option table covers every field of a recipe and describes the formats that each option applies to."""

import dataclasses

import pytest

from learned_rounding.quant_core import FORMATS, Recipe
from learned_rounding.quant_core.cli.parser import make_parser
from learned_rounding.quant_core.errors import RecipeError
from learned_rounding.quant_core.formats import FormatConfig
from learned_rounding.quant_core.recipes import FORMAT_ALIASES, OPTION_TABLE
from learned_rounding.quant_core.recipes.option_table import CONVROT, FORMAT_OPTIONS, MEASURED_ONLY

TABLE = {name: option for options in OPTION_TABLE.values() for name, option in options.items()}


# Fields that a recipe file has only where they are given.
LATER = {"bits", "linear_dtype", "card", "target_time", "smoothing", "beam_width"}


def test_every_field_of_a_recipe_is_in_the_table():
    assert set(TABLE) == Recipe().to_dict().keys() | LATER


def test_no_option_is_in_two_sections():
    assert sum(map(len, OPTION_TABLE.values())) == len(TABLE)


def test_every_option_has_help(subtests):
    for name, option in TABLE.items():
        with subtests.test(name):
            assert option.help
            assert not option.help.endswith(".")


def test_every_option_is_one_of_lrq(subtests):
    for command in ["quantize", "plan"]:
        with subtests.test(command=command):
            (commands,) = (action.choices for action in make_parser()._actions if getattr(action, "choices", None))
            known = commands[command]._option_string_actions.keys()
            for name, option in TABLE.items():
                with subtests.test(name):
                    assert known >= set(option.flags or (f"--{name}",))


def test_defaults_are_those_of_the_recipe(subtests):
    for name in ("format", "preset", "rounding", "seed", "heur", "layer_config", "block_formats"):
        with subtests.test(name):
            assert TABLE[name].default == Recipe().to_dict()[name]


CODECS = [(name, granularity) for name in FORMATS for granularity in FORMATS[name].granularities]


def test_an_option_is_accepted_by_the_formats_it_applies_to(subtests):
    for option, value in [("block_size", 64), ("convrot", True), ("full_precision_matmul", True)]:
        for name, granularity in CODECS:
            with subtests.test(name, granularity=granularity, option=option, value=value):
                if FORMAT_OPTIONS[option].applies(FormatConfig(name, granularity).codec):
                    assert getattr(FormatConfig(name, granularity, **{option: value}), option) == value
                elif FORMATS[name].full_precision_matmul != "always":
                    with pytest.raises(RecipeError):
                        FormatConfig(name, granularity, **{option: value})


def test_the_scope_of_an_option_names_the_formats_it_applies_to(subtests):
    for option in ["block_size", "convrot", "full_precision_matmul"]:
        with subtests.test(option=option):
            for name, granularity in CODECS:
                if FORMAT_OPTIONS[option].applies(FormatConfig(name, granularity).codec):
                    with subtests.test(name, granularity=granularity):
                        assert name in FORMAT_OPTIONS[option].scope


def test_formats_are_offered_with_the_aliases():
    assert set(FORMAT_OPTIONS["format"].choices) == {*FORMATS, "auto", "measured", *FORMAT_ALIASES}


def test_spellings_of_a_rotation():
    assert CONVROT["off"] is False
    assert CONVROT["on"] is True
    assert CONVROT["16"] == 16


def test_options_that_act_on_format_measured_alone():
    assert MEASURED_ONLY.keys() == {"target_size", "target_error", "block_formats", "card", "target_time"}


def test_options_that_act_on_format_measured_alone_are_fields_of_the_recipe():
    assert MEASURED_ONLY.keys() < {field.name for field in dataclasses.fields(Recipe)}
