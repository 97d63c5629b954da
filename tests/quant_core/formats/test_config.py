"""The format part of a recipe: defaults are filled in, options without effect are refused."""

from learned_rounding.quant_core import FORMATS
from learned_rounding.quant_core.errors import RecipeError
from learned_rounding.quant_core.formats import MEASURED, FormatConfig


def test_defaults_of_the_format_are_filled_in(subtests):
    for name, entry in FORMATS.items():
        config = FormatConfig(name)
        with subtests.test(name):
            assert config.granularity == next(iter(entry.granularities))
            assert config.block_size == config.codec.block_size
            assert config == FormatConfig(name, config.granularity, config.block_size)
            assert not config.measured


def test_rotation_off_has_one_spelling():
    assert FormatConfig("int8_tensorwise", convrot=False) == FormatConfig("int8_tensorwise")


def test_the_encoding_has_the_largest_group(subtests):
    for convrot, group in ((True, 256), ("auto", 256), (64, 64)):
        with subtests.test(convrot=convrot):
            assert FormatConfig("int8_tensorwise", convrot=convrot).codec.rotation.size == group


def test_the_encoding_is_not_rotated_unless_asked():
    assert FormatConfig("int8_tensorwise").codec.rotation is None


def test_bad_fields_are_refused_by_name(subtests, sentences):
    for fields in (
        {"name": 8},
        {"name": "fp9"},
        {"granularity": 1},
        {"block_size": True},
        {"convrot": 2.0},
        {"full_precision_matmul": 1},
        {"name": MEASURED, "granularity": "row"},
        {"name": MEASURED, "convrot": True},
    ):
        with subtests.test(**fields), sentences.raises(RecipeError):
            FormatConfig(**fields)


def test_format_measured_has_no_fields_of_its_own():
    config = FormatConfig(MEASURED)
    assert config.measured
    assert config.label == MEASURED
    assert config.granularity is None
