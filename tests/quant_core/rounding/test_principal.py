"""Principal rounding: rank, subspace and dampening."""

import pytest
import torch

from learned_rounding.quant_core.rounding import Principal, principal_rank
from learned_rounding.quant_core.rounding.svd import leading_singular_vectors


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
    assert quadratic.dampening > 0


def test_less_weight_error_needs_more_dampening(gaussian):
    weight = gaussian(64, 64)
    dampening = [Principal(weight_cost=cost).quadratic(weight).dampening for cost in (0.001, 0.01, 0.03, 0.1, 1.0)]
    assert dampening == sorted(dampening, reverse=True)


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
