"""Factorizations on the CPU: the same bits for any number of threads."""

from functools import partial

import pytest
import torch

from learned_rounding.quant_core import quantize_weight
from learned_rounding.quant_core.linalg import is_factored, lapack

SIDE = 384
FUNCTIONS = {
    "eigh": lambda m: lapack(torch.linalg.eigh, m).eigenvectors,
    "cholesky": lambda m: lapack(torch.linalg.cholesky_ex, m).L,
    "qr": lambda m: lapack(torch.linalg.qr, m).Q,
    "svd": lambda m: lapack(torch.linalg.svd, m)[0],
    "solve": lambda m: lapack(torch.linalg.solve, m, m.flip(0)),
}


def hessian() -> torch.Tensor:
    x = torch.randn(2 * SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    return x.t() @ x / len(x)


@pytest.fixture
def on_threads():
    """on_threads(call) → results with 1, 2, 3 and 4 threads."""
    before = torch.get_num_threads()

    def run(call):
        results = []
        for count in (1, 2, 3, 4):
            torch.set_num_threads(count)
            results.append(call())
            assert torch.get_num_threads() == count
        return results

    yield run
    torch.set_num_threads(before)


def test_factorizations_do_not_depend_on_the_number_of_threads(subtests, on_threads):
    matrix = hessian()
    for name, function in FUNCTIONS.items():
        first, *others = on_threads(partial(function, matrix))
        with subtests.test(name):
            assert all(torch.equal(first, other) for other in others)


def test_the_number_of_threads_is_restored_after_an_error(on_threads):
    def fail():
        with pytest.raises(RuntimeError):
            lapack(torch.linalg.eigh, torch.ones(2, 3))

    on_threads(fail)


def test_gptq_does_not_depend_on_the_number_of_threads(subtests, on_threads):
    weight, matrix = torch.randn(96, SIDE, generator=torch.Generator().manual_seed(1)), hessian()
    for format in ("float8_e4m3fn", "int8_blockwise"):
        quantize = partial(quantize_weight, weight, format, rounding="calibrated", hessian=matrix)
        first, *others = (made.qdata.float() for made in on_threads(quantize))
        with subtests.test(format):
            assert all(torch.equal(first, other) for other in others)


def test_a_factorization_with_nan_as_a_pivot_has_failed():
    factor, info = torch.linalg.cholesky_ex(torch.eye(3))
    assert is_factored(factor, info)
    assert not is_factored(*torch.linalg.cholesky_ex(-torch.eye(3)))
    factor[2, 2] = torch.nan  # as cuSOLVER returns it, with info 0
    assert not is_factored(factor, info)
