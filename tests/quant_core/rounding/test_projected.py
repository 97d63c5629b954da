"""GPTQ of errors that the loss sees through a projection of the rows."""

import torch

from learned_rounding.quant_core.rounding import Principal, Quadratic, gptq, projected, round_gptq, round_projected
from learned_rounding.tests.quant_core.rounding.targets import TARGETS, held_shape, start


def test_the_low_rank_factor_is_that_of_the_matrix(gaussian):
    weight = gaussian(30, 90)
    quadratic = Principal(top_p=0.3).quadratic(weight)
    found = gptq.factorize(quadratic, 90, weight.device)
    factor = quadratic.factor[found.order]
    blocks = [slice(start, min(90, start + 20)) for start in range(0, 90, 20)]
    multipliers = projected._multipliers(factor, quadratic.dampening, blocks)
    for block in blocks[:-1]:
        got = factor[block.stop :] @ multipliers[block].t()
        torch.testing.assert_close(got, found.unit[block.stop :, block], rtol=1e-3, atol=1e-4)


def test_a_projection_that_keeps_all_rows_changes_nothing(gaussian, monkeypatch):
    """In blocks of one column: the columns of a block are not fed to each other."""
    monkeypatch.setattr(projected, "_BLOCK", 1)
    weight, factor = gaussian(6, 40) * 0.02, gaussian(40, 12, seed=1)
    scaling = start(weight, "int8_tensorwise", "row")
    want = round_gptq(weight, scaling.scale, scaling.space, Quadratic(factor=factor, dampening=0.1))
    through = Quadratic(factor=factor, rows=torch.eye(6), dampening=0.1)
    got = round_projected(weight, scaling.scale, scaling.space, through)
    assert (want != scaling.space.encode(weight, scaling.scale)).any()
    assert (got == want).float().mean() > 0.99  # sums in another order may round differently


def test_the_projected_loss_is_below_that_of_round_to_nearest(subtests, gaussian):
    for format, granularity in TARGETS:
        weight = gaussian(*held_shape(format, (48, 96))) * 0.02
        scaling = start(weight, format, granularity)
        quadratic = Principal(top_p=0.2).quadratic(weight)

        def loss(qdata, scaling=scaling, quadratic=quadratic, weight=weight):
            return quadratic.loss([(0, 48, scaling.space.decode(qdata, scaling.scale) - weight)])

        got = round_projected(weight, scaling.scale, scaling.space, quadratic)
        with subtests.test(format, granularity=granularity):
            assert loss(got) < 0.7 * loss(scaling.space.encode(weight, scaling.scale))


def test_the_check_runs_before_each_block(gaussian):
    weight, calls = gaussian(8, 64), []
    scaling, quadratic = start(weight, "int8_tensorwise", "row"), Principal().quadratic(weight)
    round_projected(weight, scaling.scale, scaling.space, quadratic, check=lambda: calls.append(1))
    assert len(calls) == 2 * 64 // 8  # blocks of eight columns, once for the factor and once for the rounding
