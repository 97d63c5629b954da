"""Scalings: the start of round to nearest, and the search around it."""

import pytest
import torch

from learned_rounding.quant_core.errors import NonFiniteWeightError
from learned_rounding.quant_core.formats import make_codec
from learned_rounding.quant_core.rounding import amax_scale, round_to_nearest
from learned_rounding.quant_core.rounding.level_search import start_levels
from learned_rounding.quant_core.rounding.scaling import search_scaling, start_scaling
from learned_rounding.tests.quant_core.rounding.targets import TARGETS, held_shape, start


@pytest.fixture
def weight(gaussian):
    """Weights with heavy tails, of a shape that all formats hold."""
    return gaussian(40, 128) / gaussian(40, 128, seed=1).abs().clamp_min(1e-3).sqrt()


def test_formats_without_levels_start_at_amax(weight):
    space = make_codec("int8_tensorwise").solve_space((40, 128))
    scaling = start_scaling(weight, space)
    assert torch.equal(scaling.scale, amax_scale(weight, space)[0])
    assert scaling.space is space


def test_formats_with_levels_start_at_those_of_their_groups(weight):
    space = make_codec("asym_w4a8_int8").solve_space((40, 128))
    scaling = start_scaling(weight, space)
    levels, scale = start_levels(weight, space)
    assert torch.equal(scaling.scale, scale)
    assert torch.equal(scaling.space.levels.scale, levels.scale)
    assert scaling.parent is None


def test_two_levels_of_scales_have_a_parent(subtests, weight):
    for format, granularity in TARGETS:
        with subtests.test(format, granularity=granularity):
            assert (start(weight, format, granularity).parent is not None) == (format == "nvfp4")


def test_the_gain_is_the_ratio_of_the_weighted_errors(subtests, weight):
    """Of the chosen scale, and of the start."""
    columns, rows = torch.rand(128, generator=torch.Generator().manual_seed(2)), torch.linspace(0.1, 5, 40)

    def error(scaling):
        qdata, _ = round_to_nearest(weight, scaling.scale, scaling.space)
        lost = scaling.space.decode(qdata, scaling.scale) - weight
        return float((lost.double().square() * columns * rows[:, None]).sum().sqrt())

    for format, granularity in TARGETS:
        before = start(weight, format, granularity)
        after, gain = search_scaling(weight, before, column_weight=columns, row_weight=rows)
        few = before.space.groups.counts == (1, 1) or format == "mxfp8"  # one scale, or two candidates for each
        with subtests.test(format, granularity=granularity):
            assert gain == pytest.approx(error(after) / error(before), rel=1e-4)
            assert gain <= 1
            assert few or gain < 1


def test_weights_that_are_not_finite_are_refused(subtests):
    for format, granularity in TARGETS:
        weight = torch.ones(held_shape(format, (4, 16)))
        weight[2, 3] = torch.nan
        with subtests.test(format, granularity=granularity), pytest.raises(NonFiniteWeightError):
            start(weight, format, granularity)
