"""The format part of a recipe: defaults are filled in, options without effect are refused."""

import pytest

from learned_rounding.quant_core import FORMATS
from learned_rounding.quant_core.errors import RecipeError
from learned_rounding.quant_core.formats import MEASURED, FormatConfig


@pytest.mark.parametrize("name", FORMATS)
def test_defaults_of_the_format_are_filled_in(name):
    config = FormatConfig(name)
    assert config.granularity == next(iter(FORMATS[name].granularities))
    assert config.block_size == config.codec.block_size
    assert config == FormatConfig(name, config.granularity, config.block_size) and not config.measured


def test_rotation_off_has_one_spelling():
    assert FormatConfig("int8_tensorwise", convrot=False) == FormatConfig("int8_tensorwise")


@pytest.mark.parametrize("convrot, group", [(None, None), (True, 256), ("auto", 256), (64, 64)])
def test_the_encoding_has_the_largest_group(convrot, group):
    rotation = FormatConfig("int8_tensorwise", convrot=convrot).codec.rotation
    assert (rotation and rotation.size) == group


@pytest.mark.parametrize(
    "fields",
    [
        {"name": 8},
        {"name": "fp9"},
        {"granularity": 1},
        {"block_size": True},
        {"convrot": 2.0},
        {"full_precision_matmul": 1},
        {"name": MEASURED, "granularity": "row"},
        {"name": MEASURED, "convrot": True},
    ],
)
def test_bad_fields_are_refused_by_name(fields, sentences):
    with sentences.raises(RecipeError):
        FormatConfig(**fields)


def test_format_measured_has_no_fields_of_its_own():
    config = FormatConfig(MEASURED)
    assert config.measured and config.label == MEASURED and config.granularity is None
