"""The table is a contract with files that exist already: its strings and shapes may be added to, not changed."""

import pytest
import torch

from learned_rounding.quant_core import FORMATS
from learned_rounding.quant_core.errors import RecipeError, UnknownNameError
from learned_rounding.quant_core.formats import E4M3, GRANULARITIES, INT8, find_format


def test_keys_are_the_format_strings():
    assert all(name == entry.name for name, entry in FORMATS.items())
    assert {"float8_e4m3fn", "int8_tensorwise"} <= set(FORMATS)


@pytest.mark.parametrize(
    "name, grid, granularities, full_precision",
    [("float8_e4m3fn", E4M3, ["tensor"], True), ("int8_tensorwise", INT8, ["row", "tensor"], False)],
)
def test_entries(name, grid, granularities, full_precision):
    entry = find_format(name)
    assert entry.grid is grid
    assert list(entry.granularities) == granularities
    assert entry.full_precision_matmul is full_precision
    assert entry.granularity() == (granularities[0], GRANULARITIES[granularities[0]])  # the first is the default


@pytest.mark.parametrize(
    "name, granularity, full_precision, config",
    [
        ("float8_e4m3fn", "tensor", False, {"format": "float8_e4m3fn"}),
        ("float8_e4m3fn", "tensor", True, {"format": "float8_e4m3fn", "full_precision_matrix_mult": True}),
        ("int8_tensorwise", "row", False, {"format": "int8_tensorwise", "per_row": True}),
        ("int8_tensorwise", "tensor", False, {"format": "int8_tensorwise"}),
    ],
)
def test_json_of_a_layer(name, granularity, full_precision, config):
    assert find_format(name).config(granularity, full_precision_matmul=full_precision) == config


@pytest.mark.parametrize(
    "name, granularity, dtype, scale",
    [
        ("float8_e4m3fn", "tensor", torch.float8_e4m3fn, ()),
        ("int8_tensorwise", "row", torch.int8, (6, 1)),
        ("int8_tensorwise", "tensor", torch.int8, ()),
    ],
)
def test_specs_give_dtypes_and_shapes(name, granularity, dtype, scale):
    assert find_format(name).specs(granularity, (6, 4)) == {
        "weight": (dtype, (6, 4)),
        "weight_scale": (torch.float32, scale),
    }


@pytest.mark.parametrize("wrong, near", [("float8_e4m3", "float8_e4m3fn"), ("int8_tensorwize", "int8_tensorwise")])
def test_an_unknown_format_suggests_the_nearest(wrong, near):
    with pytest.raises(UnknownNameError, match=f"no format '{wrong}'.*did you mean '{near}'"):
        find_format(wrong)


def test_an_unknown_format_unlike_any_lists_all():
    with pytest.raises(UnknownNameError) as caught:
        find_format("~~~")
    assert all(name in str(caught.value) for name in FORMATS)


def test_an_unknown_granularity_suggests_the_nearest():
    with pytest.raises(UnknownNameError, match="no granularity 'tensr'.*did you mean 'tensor'"):
        find_format("int8_tensorwise").granularity("tensr")


def test_a_granularity_the_format_does_not_have_is_refused():
    """Stock ComfyUI crashes on, or silently misreads, row scales under the name float8_e4m3fn."""
    with pytest.raises(RecipeError, match="float8_e4m3fn has one scale per tensor, not per row"):
        find_format("float8_e4m3fn").granularity("row")
