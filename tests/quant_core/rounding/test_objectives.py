"""Objectives: what a loss measures, and what its gradient and matrix say of it."""

import pytest
import torch

from learned_rounding.quant_core.rounding import Calibrated, Identity, Principal, Quadratic
from learned_rounding.quant_core.rounding.objectives import principal_rank
from learned_rounding.quant_core.rounding.svd import leading_singular_vectors


def quadratics(gaussian) -> dict[str, Quadratic]:
    inputs = gaussian(50, 12)
    factor = gaussian(12, 4, seed=1)
    rows = torch.linalg.qr(gaussian(9, 3, seed=2)).Q
    return {
        "identity": Quadratic(),
        "gram": Quadratic(hessian=inputs.t() @ inputs / 50, damping=0.3),
        "weighted": Quadratic(hessian=inputs.t() @ inputs / 50, row_weight=torch.linspace(0, 2, 9), damping=0.1),
        "factor": Quadratic(factor=factor, damping=0.2),
        "two-sided": Quadratic(factor=factor, rows=rows, damping=0.05),
    }


KINDS = ["identity", "gram", "weighted", "factor", "two-sided"]


def slabs(error):
    for start in range(0, error.shape[0], 4):
        yield start, min(start + 4, error.shape[0]), error[start : start + 4]


def direct(quadratic: Quadratic, error: torch.Tensor) -> float:
    """tr(Uᵀ·R·E·H·Eᵀ·U) in float64, from the definition."""
    error = error.double()
    h = torch.eye(error.shape[1]).double()
    if quadratic.hessian is not None:
        h = quadratic.hessian.double()
    elif quadratic.factor is not None:
        h = quadratic.factor.double() @ quadratic.factor.double().t()
    if quadratic.row_weight is not None:
        error = error * quadratic.row_weight.double().sqrt()[:, None]
    if quadratic.rows is not None:
        error = quadratic.rows.double().t() @ error
    return float(((error @ h) * error).sum())


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_is_the_root_of_the_form(gaussian, kind):
    quadratic, error = quadratics(gaussian)[kind], gaussian(9, 12, seed=5)
    for exact in (True, False):
        assert quadratic.loss(slabs(error), exact=exact) == pytest.approx(direct(quadratic, error) ** 0.5, rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_is_that_of_the_damped_loss(gaussian, kind):
    quadratic, error = quadratics(gaussian)[kind], gaussian(9, 12, seed=5)
    step = gaussian(9, 12, seed=6) * 1e-3

    def damped(e):
        return direct(quadratic, e) + quadratic.damping * float(e.double().square().sum())

    slope = (damped(error + step) - damped(error - step)) / 2
    assert float((2 * quadratic.gradient(error) * step).sum()) == pytest.approx(slope, rel=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_matrix_and_column_weight_are_h_with_damping(gaussian, kind):
    quadratic = quadratics(gaussian)[kind]
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    matrix = quadratic.matrix(order)
    error = gaussian(9, 12, seed=5)
    if quadratic.rows is None and quadratic.row_weight is None:
        expected = direct(quadratic, error) + quadratic.damping * float(error.double().square().sum())
        assert float(((error[:, order] @ matrix) * error[:, order]).sum()) == pytest.approx(expected, rel=1e-5)
    if quadratic.column_weight is not None:  # of one error in each column in turn, on average over rows
        costs = []
        for column in range(12):
            gradients = []
            for row in range(9):
                single = torch.zeros(9, 12)
                single[row, column] = 1
                gradients.append(quadratic.gradient(single)[row, column])
            costs.append(torch.stack(gradients).mean())
        torch.testing.assert_close(torch.stack(costs), quadratic.column_weight, rtol=1e-4, atol=1e-5)


def test_damping_is_relative_to_the_mean_of_the_diagonal(gaussian):
    gram = torch.diag(torch.linspace(0, 4, 5))
    assert Calibrated(gram, 0.5).quadratic(gaussian(3, 5)).damping == pytest.approx(1.0)


def test_inputs_that_are_always_zero_say_nothing(gaussian):
    assert Calibrated(torch.zeros(5, 5)).quadratic(gaussian(3, 5)).hessian is None
    assert Identity().quadratic(gaussian(3, 5)) == Quadratic()


@pytest.mark.parametrize(
    "shape, top_p, min_k, max_k, k",
    [
        ((100, 300), 0.2, 1, 1280, 20),
        ((100, 300), 0.01, 1, 16, 1),
        ((3072, 3072), 0.2, 256, 1280, 614),
        ((100, 300), 0.2, 256, 1280, 100),
        ((12288, 12288), 0.2, 256, 1280, 1280),
        ((1, 7), 0.2, 1, 1280, 1),
    ],
)
def test_the_rank_is_counted_as_users_know_it(shape, top_p, min_k, max_k, k):
    assert principal_rank(shape, top_p, min_k, max_k) == k


@pytest.mark.parametrize("shape", [(40, 40), (80, 30), (30, 80), (1, 9), (9, 1)])
def test_principal_looks_where_the_weight_is_strong(gaussian, shape):
    weight = gaussian(*shape)
    quadratic = Principal(top_p=0.3).quadratic(weight)
    k = quadratic.rows.shape[1]
    u, _, vt = torch.linalg.svd(weight.double(), full_matrices=False)
    error = gaussian(*shape, seed=1)
    expected = float((u[:, :k].t() @ error.double() @ vt[:k].t()).norm())
    assert quadratic.loss([(0, shape[0], error)]) == pytest.approx(expected, rel=1e-3)
    assert quadratic.damping > 0


def test_less_weight_error_needs_more_damping(gaussian):
    weight = gaussian(64, 64)
    damping = [Principal(weight_cost=cost).quadratic(weight).damping for cost in (0.001, 0.01, 0.03, 0.1, 1.0)]
    assert damping == sorted(damping, reverse=True)


@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize("shape, exact", [((60, 40), 4096), ((40, 60), 4096), ((60, 50), 8), ((50, 60), 8)])
def test_singular_vectors_are_leading_and_orthonormal(gaussian, monkeypatch, shape, exact, full):
    monkeypatch.setattr("learned_rounding.quant_core.rounding.svd._EXACT", exact)  # 8: by subspace iteration
    weight = gaussian(*shape) @ torch.diag(torch.logspace(0, -2, shape[1]))
    u, v = leading_singular_vectors(weight, 10, seed=3, full=full)
    _, values, _ = torch.linalg.svd(weight)
    for vectors in (u, v):
        torch.testing.assert_close(vectors.t() @ vectors, torch.eye(10), rtol=0, atol=1e-5)
    torch.testing.assert_close((u.t() @ weight @ v).diagonal(), values[:10], rtol=1e-3, atol=1e-4)
    again = leading_singular_vectors(weight, 10, seed=3, full=full)
    assert torch.equal(again[0], u) and torch.equal(again[1], v)


def test_singular_vectors_of_nothing_are_still_orthonormal():
    u, v = leading_singular_vectors(torch.zeros(6, 4), 2)
    for vectors in (u, v):
        torch.testing.assert_close(vectors.t() @ vectors, torch.eye(2))
