"""The table is a contract with files that exist already: its strings and shapes may be added to, not changed."""

import pytest
import torch

from learned_rounding.quant_core import FORMATS
from learned_rounding.quant_core.errors import RecipeError, UnknownNameError
from learned_rounding.quant_core.formats import E2M1, E4M3, E5M2, INT4, INT8, find_format, find_sibling, make_codec
from learned_rounding.quant_core.formats.table import newest_release, release_number, with_granularity

ENTRIES = {  # name → elements, granularities, full_precision_matmul, dtype of the stored weight
    "float8_e4m3fn": (E4M3, ["tensor"], "choice", torch.float8_e4m3fn),
    "float8_e5m2": (E5M2, ["tensor"], "always", torch.float8_e5m2),
    "int8_tensorwise": (INT8, ["row", "tensor"], "never", torch.int8),
    "float8_e4m3fn_rowwise": (E4M3, ["row"], "never", torch.float8_e4m3fn),
    "float8_e4m3fn_blockwise": (E4M3, ["block"], "never", torch.float8_e4m3fn),
    "int8_blockwise": (INT8, ["block"], "never", torch.int8),
    "nvfp4": (E2M1, ["group"], "never", torch.uint8),
    "mxfp8": (E4M3, ["group"], "never", torch.float8_e4m3fn),
    "convrot_w4a4": (INT4, ["row"], "never", torch.int8),
    "asym_w4a8_int8": (INT8, ["group"], "never", torch.int8),
}


def test_keys_are_the_format_strings():
    assert [name for name, entry in FORMATS.items() if name != entry.name] == []


def test_entries(subtests):
    assert FORMATS.keys() == ENTRIES.keys()
    for name, (elements, granularities, full_precision, storage) in ENTRIES.items():
        entry = find_format(name)
        with subtests.test(name):
            assert entry.elements is elements
            assert list(entry.granularities) == granularities
            assert entry.full_precision_matmul == full_precision
            assert entry.storage_dtype is storage


def test_formats_that_stock_comfyui_reads_come_first():
    unread = [entry.stock_since is None for entry in FORMATS.values()]
    assert unread == sorted(unread)


def test_an_unknown_format_suggests_the_nearest(subtests, sentences):
    for wrong in ("float8_e4m3", "int8_tensorwize"):
        with subtests.test(wrong):
            with sentences.raises(UnknownNameError) as caught:
                find_format(wrong)
            assert caught.value.kind == "format"
            assert caught.value.name == wrong


def test_an_unknown_format_unlike_any_lists_all(sentences):
    with sentences.raises(UnknownNameError) as caught:
        find_format("~~~")
    assert caught.value.known == sorted(FORMATS)


def test_siblings_share_the_elements(subtests):
    for name, granularity, other in (
        ("float8_e4m3fn", "row", "float8_e4m3fn_rowwise"),
        ("float8_e4m3fn_rowwise", "block", "float8_e4m3fn_blockwise"),
        ("int8_tensorwise", "block", "int8_blockwise"),
        ("int8_blockwise", "tensor", "int8_tensorwise"),
    ):
        with subtests.test(name, granularity=granularity):
            assert find_sibling(find_format(name), granularity).name == other
            assert with_granularity(name, granularity) == other


def test_a_format_may_have_no_sibling(subtests):
    for name, granularity in (("float8_e5m2", "row"), ("asym_w4a8_int8", "row"), ("int8_tensorwise", "group")):
        with subtests.test(name, granularity=granularity):
            assert find_sibling(find_format(name), granularity) is None
            assert with_granularity(name, granularity) == name


def test_the_format_stays_where_it_has_the_granularity(subtests):
    for granularity in (None, "row", "tensor"):
        with subtests.test(granularity=granularity):
            assert with_granularity("int8_tensorwise", granularity) == "int8_tensorwise"


def test_the_first_granularity_is_the_default():
    assert make_codec("int8_tensorwise").granularity == "row"


def test_blocks_have_128_columns_by_default():
    assert make_codec("int8_blockwise").block_size == 128


def test_an_unknown_granularity_suggests_the_nearest(sentences):
    with sentences.raises(UnknownNameError):
        make_codec("int8_tensorwise", "tensr")


def test_a_granularity_of_another_format_is_refused(subtests):
    for name, hint in (("float8_e4m3fn", "float8_e4m3fn_rowwise has"), ("nvfp4", "choose another format")):
        with subtests.test(name), pytest.raises(RecipeError, match=hint):
            make_codec(name, "row")


def test_releases_compare_by_age():
    assert release_number("0.3.75") < release_number("0.27")


def test_the_newest_of_some_releases_is_found():
    assert newest_release(["0.8", None, "0.27", "0.3.75"]) == "0.27"


def test_no_release_is_the_newest_of_none():
    assert newest_release([None, None]) is None
