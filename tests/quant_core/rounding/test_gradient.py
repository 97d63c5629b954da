"""Gradient rounding: only neighbouring values, judged after rounding, more steps never worse."""

import pytest
import torch

from learned_rounding.quant_core import quantize_weight
from learned_rounding.quant_core.formats import make_codec
from learned_rounding.quant_core.rounding import OPTIMIZERS, SCHEDULES, hessian_quadratic, round_gradient
from learned_rounding.tests.quant_core.rounding.targets import TARGETS, start

BASIC = [("int8_tensorwise", "row"), ("asym_w4a8_int8", "group")]


@pytest.fixture
def problem(gaussian, anisotropic):
    """problem(format, granularity, shape) → everything round_gradient takes before its options."""

    def make(format="int8_tensorwise", granularity="row", shape=(24, 96)):
        weight, known = gaussian(*shape) * 0.02, anisotropic(shape[1])
        scaling = start(weight, format, granularity)
        return weight, scaling.scale, scaling.space, hessian_quadratic(known.hessian, 0.01)

    return make


def dampened_loss(qdata, weight, scale, space, quadratic) -> float:
    error = space.decode(qdata, scale) - weight
    return float((quadratic.gradient(error) * error).sum().double())


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimizer_beats_nearest_with_neighbouring_values(subtests, problem, optimizer):
    """Every format with one of the optimizers, and INT8 rows and W4A8 levels with each."""
    rest = [target for target in TARGETS if target not in BASIC]
    for format, granularity in (*BASIC, *rest[list(OPTIMIZERS).index(optimizer) :: len(OPTIMIZERS)]):
        weight, scale, space, _ = arguments = problem(format, granularity)
        qdata = round_gradient(*arguments, optimizer=optimizer, num_iter=130)
        low, high = space.neighbours(weight / space.divisor(scale))
        with subtests.test(format, granularity=granularity):
            assert ((qdata.float() == low) | (qdata.float() == high)).all()
            assert dampened_loss(qdata, *arguments) < 0.8 * dampened_loss(space.encode(weight, scale), *arguments)


def test_more_steps_are_never_worse(subtests, problem):
    """Every optimizer with its own schedule and another one, and every schedule."""
    arguments = problem()
    schedules = [None, *SCHEDULES]
    for index, optimizer in enumerate(OPTIMIZERS):
        for schedule in {None, schedules[1 + index % len(SCHEDULES)]}:
            options = {"optimizer": optimizer, "lr_schedule": schedule}
            losses = [
                dampened_loss(round_gradient(*arguments, num_iter=steps, **options), *arguments)
                for steps in (0, 1, 5, 40, 126)
            ]
            with subtests.test(**options):
                assert losses == sorted(losses, reverse=True)
                assert losses[-1] < losses[0]


def test_without_steps_it_is_nearest(problem):
    weight, scale, space, quadratic = problem()
    qdata = round_gradient(weight, scale, space, quadratic, optimizer="adamw", num_iter=0)
    assert torch.equal(qdata, space.encode(weight, scale))


def test_the_same_steps_give_the_same_values(subtests, problem):
    for optimizer in OPTIMIZERS:
        first, second = (round_gradient(*problem(), optimizer=optimizer, num_iter=30) for _ in range(2))
        with subtests.test(optimizer):
            assert torch.equal(first, second)


def test_it_stops_when_nothing_improves(problem):
    calls = []
    round_gradient(
        *problem(), optimizer="original", num_iter=10**5, lr=1e-9, early_stop=7, check=lambda: calls.append(1)
    )
    assert len(calls) < 50


def test_representable_weights_and_those_beyond_the_end_are_left_alone(gaussian, anisotropic):
    weight = torch.cat([gaussian(3, 32).round().clamp(-127, 127), torch.full((1, 32), 300.0)])
    space = make_codec("int8_tensorwise", "row").solve_space((4, 32))
    quadratic = hessian_quadratic(anisotropic(32).hessian, 0.01)
    qdata = round_gradient(weight, torch.ones(4, 1), space, quadratic, optimizer="adamw", num_iter=20)
    assert torch.equal(qdata.float(), weight.clamp(max=127))


def test_it_runs_inside_inference_mode(gaussian, anisotropic):
    with torch.inference_mode():
        known = anisotropic(48)
        result = quantize_weight(
            gaussian(8, 48), "int8_tensorwise", hessian=known.hessian, optimizer="adamw", num_iter=20
        )
    assert result.solution.solver == "adamw"
