"""Deterministic LAPACK calls on the CPU: the same bits for any number of threads."""

import threading
from collections.abc import Callable

import torch

__all__ = ["is_factored", "lapack"]

_LOCK = threading.Lock()  # the number of threads is a setting of the process


def lapack(function: Callable, matrix: torch.Tensor, *arguments, **options):
    """Call ``function(matrix, …)`` of torch.linalg, with one thread if ``matrix`` is on the CPU.

    The order of LAPACK's sums depends on the number of threads. A factorization takes up to (number of cores) times as
    long; matrix products, which are most of the work, keep all threads.
    """
    if matrix.device.type != "cpu":
        return function(matrix, *arguments, **options)
    with _LOCK:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return function(matrix, *arguments, **options)
        finally:
            torch.set_num_threads(threads)


def is_factored(factor: torch.Tensor, info: torch.Tensor) -> bool:
    """Whether ``torch.linalg.cholesky_ex`` has factored the matrix.

    cuSOLVER can return NaN as a pivot of an indefinite matrix without reporting it in ``info``.
    """
    return not info and bool(torch.isfinite(factor.diagonal()).all())
