"""Principal rounding: rank, subspace, dampening, and the weight error that it costs."""

import pytest
import torch

from learned_rounding.quant_core import quantize_weight
from learned_rounding.quant_core.rounding import Principal, principal_rank
from learned_rounding.tests.quant_core.rounding.targets import TARGETS


def test_the_rank_is_a_fraction_of_the_smaller_side_within_limits(subtests):
    for shape, top_p, min_k, max_k, k in (
        ((100, 300), 0.2, 1, 1280, 20),
        ((100, 300), 0.01, 1, 16, 1),
        ((3072, 3072), 0.2, 256, 1280, 614),
        ((100, 300), 0.2, 256, 1280, 100),
        ((12288, 12288), 0.2, 256, 1280, 1280),
        ((1, 7), 0.2, 1, 1280, 1),
    ):
        with subtests.test(shape=shape, top_p=top_p, min_k=min_k, max_k=max_k):
            assert principal_rank(shape, top_p, min_k, max_k) == k


def test_the_loss_is_that_in_the_leading_singular_directions(subtests, gaussian):
    for shape in ((40, 40), (80, 30), (30, 80), (1, 9), (9, 1)):
        weight, error = gaussian(*shape), gaussian(*shape, seed=1)
        quadratic = Principal(top_p=0.3).quadratic(weight)
        k = quadratic.rows.shape[1]
        u, _, vt = torch.linalg.svd(weight.double(), full_matrices=False)
        expected = float((u[:, :k].t() @ error.double() @ vt[:k].t()).norm())
        with subtests.test(shape=shape):
            assert quadratic.loss([(0, shape[0], error)]) == pytest.approx(expected, rel=1e-3)
            assert quadratic.dampening > 0


def test_less_weight_error_needs_more_dampening(gaussian):
    weight = gaussian(64, 64)
    dampening = [Principal(weight_cost=cost).quadratic(weight).dampening for cost in (0.001, 0.01, 0.03, 0.1, 1.0)]
    assert dampening == sorted(dampening, reverse=True)


@pytest.mark.parametrize("shape", [(256, 256), (512, 128), (128, 512)])
def test_the_loss_falls_to_0_55_at_3_percent_more_weight_error(subtests, gaussian, weight_error, shape):
    """k = 0.2·min(out, in), U and V from the exact SVD; each format with one shape, and each shape."""
    targets = TARGETS[[(256, 256), (512, 128), (128, 512)].index(shape) :: 3]
    weight = gaussian(*shape) * 0.02
    u, _, vt = torch.linalg.svd(weight.double(), full_matrices=False)
    k = int(0.2 * min(shape))

    def loss(quantized):
        return float((u[:, :k].t() @ (quantized.dequantize().double() - weight.double()) @ vt[:k].t()).norm())

    for format, granularity in targets:
        searched = quantize_weight(weight, format, granularity=granularity)
        learned = quantize_weight(weight, format, granularity=granularity, rounding="principal")
        with subtests.test(format, granularity=granularity):
            assert loss(learned) < 0.55 * loss(searched)
            assert weight_error(learned, weight) <= 1.03 * weight_error(searched, weight) * (1 + 1e-5)


def test_the_cost_is_kept_on_localized_directions(gaussian):
    """Singular vectors of trained weights lean on few rows and columns; the cost is then searched, not computed."""
    weight = gaussian(200, 200) * 0.02
    weight[:40] *= 8
    weight[:, :30] *= 5
    nearest = quantize_weight(weight, "int8_tensorwise").weight_error
    made = quantize_weight(weight, "int8_tensorwise", rounding="principal")
    assert made.solution.solver == "gptq"
    assert made.solution.gain < 0.8
    assert made.weight_error <= 1.03 * nearest * (1 + 1e-6)


def test_the_cost_bounds_the_weight_error(gaussian):
    weight, costs = gaussian(200, 200), (0.003, 0.02, 0.2)
    nearest = quantize_weight(weight, "int8_tensorwise").weight_error
    results = [quantize_weight(weight, "int8_tensorwise", rounding="principal", weight_cost=cost) for cost in costs]
    assert all(nearest < made.weight_error <= nearest * (1 + cost) for cost, made in zip(costs, results, strict=True))
    gains = [made.solution.gain for made in results]
    assert gains == sorted(gains, reverse=True)
