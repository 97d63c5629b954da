"""Levels of a weight: codes, scales of rows and groups, and the search around them."""

import pytest
import torch

from learned_rounding.quant_core.errors import NonFiniteWeightError
from learned_rounding.quant_core.formats import make_codec
from learned_rounding.quant_core.rounding import slabs
from learned_rounding.quant_core.rounding.level_search import fit_codes, search_levels, start_levels

BITS = (4, 6)
both_sizes = pytest.mark.parametrize("bits", BITS)


def space_of(bits: int, shape=(12, 64)):
    return make_codec("asym_w4a8_int8", bits=bits, convrot=16).solve_space(shape)


def decode(levels, scale, weight) -> torch.Tensor:
    """The weight after round to nearest."""
    return levels.nearest(weight / scale) * scale


@both_sizes
def test_the_largest_level_of_each_row_is_127(gaussian, bits):
    levels, scale = start_levels(gaussian(12, 64), space_of(bits))
    largest = (levels.scale[..., None] * levels.codes).round().abs().amax(dim=(1, 2))
    assert scale.shape == (12, 1)
    assert ((largest >= 120) & (largest <= 135)).all()  # the E4M3 scale of its group is rounded


@both_sizes
def test_group_scales_are_e4m3(gaussian, bits):
    levels, _ = start_levels(gaussian(12, 64), space_of(bits))
    assert torch.equal(levels.scale, levels.scale.to(torch.float8_e4m3fn).float())


@both_sizes
def test_slabs_change_nothing(gaussian, monkeypatch, bits):
    whole = start_levels(gaussian(12, 64), space_of(bits))
    monkeypatch.setitem(slabs._SLAB, "cpu", 100)
    parts = start_levels(gaussian(12, 64), space_of(bits))
    assert torch.equal(parts[0].scale, whole[0].scale)
    assert torch.equal(parts[1], whole[1])


@both_sizes
def test_weights_that_are_not_finite_are_refused(gaussian, bits):
    weight = gaussian(12, 64)
    weight[3, 5] = torch.inf
    with pytest.raises(NonFiniteWeightError):
        start_levels(weight, space_of(bits))


def test_gaussian_weights_have_the_codes_of_comfy_kitchen(gaussian):
    space = space_of(4)
    assert torch.equal(start_levels(gaussian(12, 64), space)[0].codes, space.levels.codes)


def test_codes_are_fitted_to_heavy_tails(gaussian):
    space, weight = space_of(4), gaussian(12, 64) ** 5
    levels, scale = start_levels(weight, space)
    assert not torch.equal(levels.codes, space.levels.codes)
    gaussian_codes = levels.with_scale(levels.scale, space.levels.codes)
    fitted, usual = ((decode(made, scale, weight) - weight).norm() for made in (levels, gaussian_codes))
    assert fitted < usual


def test_six_bits_keep_their_integers(gaussian):
    levels, _ = start_levels(gaussian(12, 64) ** 5, space_of(6))
    assert torch.equal(levels.codes, torch.arange(-31.0, 32.0))


def test_fitted_codes_ascend_and_have_the_least_squared_error():
    values = torch.cat([torch.full((100,), number) for number in (-1.0, 0.0, 0.25, 2.0)])
    assert fit_codes(values, 4).tolist() == [-1, 0, 0.25, 2]


def test_each_fitted_code_is_the_mean_of_its_values(gaussian):
    values = gaussian(20_000)
    codes = fit_codes(values, 4)
    nearest = (values[:, None] - codes).abs().argmin(dim=1)
    means = torch.stack([values[nearest == index].mean() for index in range(4)])
    torch.testing.assert_close(codes, means, rtol=0, atol=0.01)


@both_sizes
def test_the_search_is_never_worse_in_any_group(gaussian, bits):
    weight, space = gaussian(12, 64), space_of(bits)
    start, scale = start_levels(weight, space)
    found, gain = search_levels(weight, start, scale, space)

    def errors(levels):
        return (decode(levels, scale, weight) - weight).square().unflatten(1, (-1, 16)).sum(dim=-1)

    assert (errors(found) <= errors(start) * (1 + 1e-5)).all()
    assert gain == pytest.approx(float((errors(found).sum() / errors(start).sum()).sqrt()), rel=1e-4)
    assert gain < 1


@both_sizes
def test_weighted_columns_and_rows_count_in_the_gain(gaussian, bits):
    weight, space = gaussian(12, 64), space_of(bits)
    start, scale = start_levels(weight, space)
    columns, rows = torch.linspace(0, 2, 64), torch.linspace(0.1, 3, 12)
    found, gain = search_levels(weight, start, scale, space, column_weight=columns, row_weight=rows)

    def error(levels):
        return ((decode(levels, scale, weight) - weight).square() * columns * rows[:, None]).sum().sqrt()

    assert gain == pytest.approx(float(error(found) / error(start)), rel=1e-4)


def test_a_weight_without_an_error_has_the_gain_one():
    weight, space = torch.zeros(12, 64), space_of(6)
    start, scale = start_levels(weight, space)
    assert search_levels(weight, start, scale, space)[1] == 1
