"""Stochastic rounding: one of two neighbours, and right on average."""

import torch

from learned_rounding.quant_core.rounding import round_stochastic
from learned_rounding.tests.quant_core.rounding.targets import TARGETS, held_shape, start

DRAWS = 400


def test_the_mean_of_many_draws_is_the_weight(subtests, gaussian):
    for format, granularity in TARGETS:
        weight = gaussian(*held_shape(format, (12, 40))) * 0.02
        scaling = start(weight, format, granularity)
        space, scale = scaling.space, scaling.scale
        drawn = [space.decode(round_stochastic(weight, scale, space, seed=seed), scale) for seed in range(DRAWS)]
        divisor = space.divisor(scale)
        low, high = (value * divisor for value in space.neighbours(weight / divisor))
        error = torch.stack(drawn).double().mean(dim=0) - weight.double()
        # Between two neighbours a share p of the upper one has variance p(1−p)/draws; 6 standard deviations for 480 weights.
        bound = 6 * (high - low) * 0.5 / DRAWS**0.5 + 1e-7
        # Where nothing clamps: an E4M3 scale may be rounded below amax / 6, and W4A8 clips by least squares.
        inside = high > low
        with subtests.test(format, granularity=granularity):
            assert inside.float().mean() > (0.95 if space.levels is None else 0.8)
            assert (error.abs() <= bound)[inside].all()
            assert error[inside].mean().abs() < bound.mean() / 10
            nearest = space.decode(space.encode(weight, scale), scale)
            assert error[inside].norm() < 0.5 * (nearest - weight)[inside].norm()


def test_each_value_is_one_of_two_neighbours(subtests, gaussian):
    for format, granularity in TARGETS:
        weight = gaussian(*held_shape(format, (12, 40)))
        scaling = start(weight, format, granularity)
        qdata = round_stochastic(weight, scaling.scale, scaling.space, seed=1).float()
        low, high = scaling.space.neighbours(weight / scaling.space.divisor(scaling.scale))
        with subtests.test(format, granularity=granularity):
            assert ((qdata == low) | (qdata == high)).all()


def test_values_follow_the_seed(subtests, gaussian):
    for format, granularity in TARGETS:
        weight = gaussian(*held_shape(format, (12, 40)))
        scaling = start(weight, format, granularity)
        first, again, other = (
            round_stochastic(weight, scaling.scale, scaling.space, seed=seed).view(torch.uint8) for seed in (1, 1, 2)
        )
        with subtests.test(format, granularity=granularity):
            assert torch.equal(first, again)
            assert not torch.equal(first, other)
