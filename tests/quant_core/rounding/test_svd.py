"""Leading singular vectors: orthonormal, of the largest values, the same for the same seed."""

import pytest
import torch

from learned_rounding.quant_core.rounding import svd
from learned_rounding.quant_core.rounding.svd import leading_singular_vectors

METHODS = {  # method: (shape, limit up to which eigenvectors are exact, whether the SVD is complete)
    "tall, eigenvectors": ((60, 40), 4096, False),
    "wide, eigenvectors": ((40, 60), 4096, False),
    "tall, subspace iteration": ((60, 50), 8, False),
    "wide, subspace iteration": ((50, 60), 8, False),
    "complete SVD": ((60, 40), 4096, True),
}


@pytest.mark.parametrize("method", METHODS)
def test_singular_vectors_are_leading_and_orthonormal(gaussian, monkeypatch, method):
    shape, exact, full = METHODS[method]
    monkeypatch.setattr(svd, "_EXACT", exact)
    weight = gaussian(*shape) @ torch.diag(torch.logspace(0, -2, shape[1]))
    u, v = leading_singular_vectors(weight, 10, seed=3, full=full)
    _, values, _ = torch.linalg.svd(weight)
    torch.testing.assert_close(u.t() @ u, torch.eye(10), rtol=0, atol=1e-5)
    torch.testing.assert_close(v.t() @ v, torch.eye(10), rtol=0, atol=1e-5)
    torch.testing.assert_close((u.t() @ weight @ v).diagonal(), values[:10], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_the_same_seed_gives_the_same_vectors(gaussian, monkeypatch, method):
    shape, exact, full = METHODS[method]
    monkeypatch.setattr(svd, "_EXACT", exact)
    first, again = (leading_singular_vectors(gaussian(*shape), 10, seed=3, full=full) for _ in range(2))
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])


def test_the_magnitude_of_the_weight_does_not_matter(subtests, gaussian):
    weight = gaussian(30, 20)
    expected = leading_singular_vectors(weight, 5)
    for magnitude in (1e-30, 1e30):
        found = leading_singular_vectors(weight * magnitude, 5)
        with subtests.test(magnitude=magnitude):
            torch.testing.assert_close((found[0].t() @ expected[0]).abs(), torch.eye(5), rtol=0, atol=1e-3)


def test_singular_vectors_of_zeros_are_orthonormal():
    u, v = leading_singular_vectors(torch.zeros(6, 4), 2)
    torch.testing.assert_close(u.t() @ u, torch.eye(2))
    torch.testing.assert_close(v.t() @ v, torch.eye(2))
