"""The histogram of magnitudes, and the scale for FP8 inputs that follows from it."""

import pytest
import torch

from learned_rounding.quant_core.calibration import input_scale
from learned_rounding.quant_core.calibration.histogram import BINS, histogram, magnitudes


def values(scale=1.0, count=200_000):
    return torch.randn(count, generator=torch.Generator().manual_seed(0)) * scale


def fp8_error(x, scale):
    codes = (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float()
    return float((codes * scale - x).norm() / x.norm())


def test_every_value_is_counted_where_it_belongs():
    x = torch.tensor([0.0, 1e-30, 1.05, -1.05, 3.0, 1e30, float("inf"), float("nan")])
    counts, middles = histogram(x), magnitudes()
    assert counts.sum() == len(x) and counts[0] == 2 and counts[-1] == 3
    for value, count in ((1.05, 2), (3.0, 1)):
        (place,) = ((middles / value).log2().abs() < 1 / 16 + 1e-6).nonzero().flatten().tolist()
        assert counts[place] == count
    assert len(counts) == len(middles) == BINS and (middles.diff() > 0).all()


@pytest.mark.parametrize("scale", [1e-3, 300.0, 1e4])
def test_the_scale_is_as_good_as_the_best(scale):
    """Values that FP8 as it is would flush or clip."""
    x = values(scale)
    found = input_scale(histogram(x), float(x.abs().max()))
    best = min(fp8_error(x, float(x.abs().max()) / 448 * 2 ** (-step / 4)) for step in range(-4, 24))
    assert fp8_error(x, found) < 1.03 * best < 0.9 * fp8_error(x, 1.0)


def test_there_is_none_where_it_would_not_help():
    x = values()
    assert input_scale(histogram(x), float(x.abs().max())) is None
    assert input_scale(histogram(x[:0]), 0.0) is None
    assert input_scale(histogram(x), float("inf")) is None


def test_a_scale_is_a_normal_number():
    for amax in (1e-45, 1e-40, 1e-36, 1e-33, 1e-30):
        counts = torch.ones(BINS)
        found = input_scale(counts, amax)
        assert found is None or torch.tensor(found) >= torch.finfo(torch.float32).tiny
    assert input_scale(torch.ones(BINS), 1e-30) is not None


def test_room_is_left_for_larger_inputs_where_that_costs_nothing():
    x = values(1000.0)
    largest = float(x.abs().max())
    assert input_scale(histogram(x), largest) > 1.4 * largest / 448


def test_one_outlier_does_not_cost_all_others_their_bits():
    x = torch.cat([values(1e-3), torch.tensor([1.0])])
    found = input_scale(histogram(x), 1.0)
    assert fp8_error(x[:-1], found) < 0.04
