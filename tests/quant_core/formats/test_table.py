"""The table is a contract with files that exist already: its strings and shapes may be added to, not changed."""

import pytest

from learned_rounding.quant_core import FORMATS
from learned_rounding.quant_core.errors import UnknownNameError
from learned_rounding.quant_core.formats import E2M1, E4M3, E5M2, INT8, find_format, find_sibling


def test_keys_are_the_format_strings():
    assert all(name == entry.name for name, entry in FORMATS.items())
    assert {"float8_e4m3fn", "int8_tensorwise"} <= set(FORMATS)


@pytest.mark.parametrize(
    "name, elements, granularities, full_precision",
    [
        ("float8_e4m3fn", E4M3, ["tensor"], "choice"),
        ("float8_e5m2", E5M2, ["tensor"], "always"),
        ("int8_tensorwise", INT8, ["row", "tensor"], "never"),
        ("float8_e4m3fn_rowwise", E4M3, ["row"], "never"),
        ("float8_e4m3fn_blockwise", E4M3, ["block"], "never"),
        ("int8_blockwise", INT8, ["block"], "never"),
        ("nvfp4", E2M1, ["group"], "never"),
        ("mxfp8", E4M3, ["group"], "never"),
    ],
)
def test_entries(name, elements, granularities, full_precision):
    entry = find_format(name)
    assert entry.elements is elements
    assert list(entry.granularities) == granularities
    assert entry.full_precision_matmul == full_precision


@pytest.mark.parametrize("wrong", ["float8_e4m3", "int8_tensorwize"])
def test_an_unknown_format_suggests_the_nearest(wrong, sentences):
    with sentences.raises(UnknownNameError) as caught:
        find_format(wrong)
    assert (caught.value.kind, caught.value.name) == ("format", wrong)


def test_an_unknown_format_unlike_any_lists_all(sentences):
    with sentences.raises(UnknownNameError) as caught:
        find_format("~~~")
    assert caught.value.known == sorted(FORMATS)


@pytest.mark.parametrize(
    "name, granularity, other",
    [
        ("float8_e4m3fn", "row", "float8_e4m3fn_rowwise"),
        ("float8_e4m3fn_rowwise", "block", "float8_e4m3fn_blockwise"),
        ("int8_tensorwise", "block", "int8_blockwise"),
        ("int8_blockwise", "tensor", "int8_tensorwise"),
    ],
)
def test_siblings_share_the_elements(name, granularity, other):
    assert find_sibling(find_format(name), granularity).name == other


def test_a_format_may_have_no_find_sibling():
    assert find_sibling(find_format("float8_e5m2"), "row") is None
    assert find_sibling(find_format("asym_w4a8_int8"), "row") is None
    assert find_sibling(find_format("int8_tensorwise"), "group") is None
