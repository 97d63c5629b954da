"""Stochastic rounding: one of two neighbours, and right on average."""

import pytest
import torch

from learned_rounding.quant_core import FORMATS, quantize_weight

TARGETS = [(name, granularity) for name, entry in FORMATS.items() for granularity in entry.granularities]
DRAWS = 400


@pytest.mark.parametrize("format, granularity", TARGETS)
def test_it_is_unbiased(gaussian, format, granularity):
    weight = gaussian(12, 40) * 0.02
    made = [
        quantize_weight(weight, format, granularity=granularity, rounding="stochastic", seed=seed)
        for seed in range(DRAWS)
    ]
    decoded = torch.stack([one.dequantize() for one in made]).double()
    scale = made[0].codec.solve_space((12, 40)).divisor(made[0].scale)
    low, high = (value * scale for value in made[0].format.elements.neighbours(weight / scale))
    mean = decoded.mean(dim=0)
    # Between two neighbours a share p of the upper one has variance p(1−p)/draws; 6 standard deviations for 480 weights.
    bound = 6 * (high - low) * 0.5 / DRAWS**0.5 + 1e-7
    inside = high > low  # where nothing clamps: an E4M3 scale may be rounded below amax / 6
    assert inside.float().mean() > 0.95
    assert ((mean - weight.double()).abs() <= bound)[inside].all()
    assert (mean - weight.double())[inside].mean().abs() < bound.mean() / 10
    nearest = quantize_weight(weight, format, granularity=granularity, rounding="nearest").dequantize().double()
    assert (mean - weight).norm() < 0.5 * (nearest - weight).norm()


@pytest.mark.parametrize("format, granularity", TARGETS)
def test_codes_are_neighbours_and_follow_the_seed(gaussian, format, granularity):
    weight = gaussian(12, 40)
    first, again, other = (
        quantize_weight(weight, format, granularity=granularity, rounding="stochastic", seed=seed) for seed in (1, 1, 2)
    )
    assert torch.equal(first.qdata.view(torch.uint8), again.qdata.view(torch.uint8))
    assert not torch.equal(first.qdata.view(torch.uint8), other.qdata.view(torch.uint8))
    assert first.solution.solver == "stochastic" and torch.equal(first.scale, other.scale)
    scale = first.codec.solve_space((12, 40)).divisor(first.scale)
    low, high = first.format.elements.neighbours(weight / scale)
    assert ((first.qdata.float() == low) | (first.qdata.float() == high)).all()
