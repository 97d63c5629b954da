"""Quadratic forms: loss, gradient and matrix agree with the definition."""

import pytest
import torch

from learned_rounding.quant_core.rounding import Quadratic, hessian_quadratic


def quadratics(gaussian) -> dict[str, Quadratic]:
    inputs = gaussian(50, 12)
    factor = gaussian(12, 4, seed=1)
    rows = torch.linalg.qr(gaussian(9, 3, seed=2)).Q
    return {
        "identity": Quadratic(),
        "hessian": Quadratic(hessian=inputs.t() @ inputs / 50, dampening=0.3),
        "weighted": Quadratic(hessian=inputs.t() @ inputs / 50, row_weight=torch.linspace(0, 2, 9), dampening=0.1),
        "factor": Quadratic(factor=factor, dampening=0.2),
        "two-sided": Quadratic(factor=factor, rows=rows, dampening=0.05),
    }


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


def test_the_loss_is_the_root_of_the_form(subtests, gaussian):
    error = gaussian(9, 12, seed=5)
    for kind, quadratic in quadratics(gaussian).items():
        for exact in (True, False):
            with subtests.test(kind, exact=exact):
                loss = quadratic.loss(slabs(error), exact=exact)
                assert loss == pytest.approx(direct(quadratic, error) ** 0.5, rel=1e-5)


def dampened(quadratic: Quadratic, error: torch.Tensor) -> float:
    return direct(quadratic, error) + quadratic.dampening * float(error.double().square().sum())


def test_the_gradient_is_that_of_the_dampened_loss(subtests, gaussian):
    error, step = gaussian(9, 12, seed=5), gaussian(9, 12, seed=6) * 1e-3
    for kind, quadratic in quadratics(gaussian).items():
        slope = (dampened(quadratic, error + step) - dampened(quadratic, error - step)) / 2
        with subtests.test(kind):
            assert float((2 * quadratic.gradient(error) * step).sum()) == pytest.approx(slope, rel=1e-3)


def test_the_matrix_is_the_dampened_hessian_in_any_order(subtests, gaussian):
    error, order = gaussian(9, 12, seed=5), torch.randperm(12, generator=torch.Generator().manual_seed(0))
    for kind, quadratic in quadratics(gaussian).items():
        if quadratic.rows is None and quadratic.row_weight is None:
            form = float(((error[:, order] @ quadratic.matrix(order)) * error[:, order]).sum())
            with subtests.test(kind):
                assert form == pytest.approx(dampened(quadratic, error), rel=1e-5)


def test_the_column_weight_is_the_cost_of_one_error_on_average_over_rows(subtests, gaussian):
    for kind, quadratic in quadratics(gaussian).items():
        if quadratic.column_weight is None:
            continue
        costs = torch.zeros(9, 12)
        for row in range(9):
            for column in range(12):
                single = torch.zeros(9, 12)
                single[row, column] = 1
                costs[row, column] = quadratic.gradient(single)[row, column]
        with subtests.test(kind):
            torch.testing.assert_close(costs.mean(dim=0), quadratic.column_weight, rtol=1e-4, atol=1e-5)


def test_dampening_is_relative_to_the_mean_of_the_diagonal():
    assert hessian_quadratic(torch.diag(torch.linspace(0, 4, 5)), 0.5).dampening == pytest.approx(1.0)


def test_activations_that_are_always_zero_leave_the_identity():
    assert hessian_quadratic(torch.zeros(5, 5), 0.01).hessian is None
