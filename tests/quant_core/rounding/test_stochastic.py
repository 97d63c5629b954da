"""Stochastic rounding: one of two neighbours, and right on average."""

import pytest
import torch

from learned_rounding.quant_core import quantize_weight
from learned_rounding.tests.quant_core.rounding.targets import TARGETS, held_shape, stored

DRAWS = 400


@pytest.mark.parametrize("format, granularity", TARGETS)
def test_it_is_unbiased(gaussian, format, granularity):
    weight = gaussian(*held_shape(format, (12, 40))) * 0.02
    made = [
        quantize_weight(weight, format, granularity=granularity, rounding="stochastic", seed=seed)
        for seed in range(DRAWS)
    ]
    weight, scaling = stored(made[0], weight)
    decoded = torch.stack([scaling.space.decode(one.qdata, one.scale) for one in made]).double()
    scale = scaling.space.divisor(scaling.scale)
    low, high = (value * scale for value in scaling.space.neighbours(weight / scale))
    mean = decoded.mean(dim=0)
    # Between two neighbours a share p of the upper one has variance p(1−p)/draws; 6 standard deviations for 480 weights.
    bound = 6 * (high - low) * 0.5 / DRAWS**0.5 + 1e-7
    inside = (
        high > low
    )  # where nothing clamps: an E4M3 scale may be rounded below amax / 6, and W4A8 clips by least squares
    assert inside.float().mean() > (0.95 if scaling.space.levels is None else 0.8)
    assert ((mean - weight.double()).abs() <= bound)[inside].all()
    assert (mean - weight.double())[inside].mean().abs() < bound.mean() / 10
    nearest = scaling.space.decode(scaling.space.encode(weight, scaling.scale), scaling.scale)
    assert (mean - weight)[inside].norm() < 0.5 * (nearest - weight)[inside].norm()


@pytest.mark.parametrize("format, granularity", TARGETS)
def test_codes_are_neighbours_and_follow_the_seed(gaussian, format, granularity):
    weight = gaussian(*held_shape(format, (12, 40)))
    first, again, other = (
        quantize_weight(weight, format, granularity=granularity, rounding="stochastic", seed=seed) for seed in (1, 1, 2)
    )
    assert torch.equal(first.qdata.view(torch.uint8), again.qdata.view(torch.uint8))
    assert not torch.equal(first.qdata.view(torch.uint8), other.qdata.view(torch.uint8))
    assert first.solution.solver == "stochastic" and torch.equal(first.scale, other.scale)
    weight, scaling = stored(first, weight)
    low, high = scaling.space.neighbours(weight / scaling.space.divisor(scaling.scale))
    assert ((first.qdata.float() == low) | (first.qdata.float() == high)).all()
