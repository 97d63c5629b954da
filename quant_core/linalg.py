"""LAPACK on a CPU, to the same bits on any number of threads."""

import threading
from collections.abc import Callable

import torch

__all__ = ["lapack"]

_ONE_AT_A_TIME = threading.Lock()


def lapack(function: Callable, matrix: torch.Tensor, *arguments, **options):
    """``function(matrix, …)`` of torch.linalg. On a CPU by one thread: LAPACK's sums depend on how many share them.

    Takes up to as many times as long as there are cores; products of matrices, which are most of the work, keep all of them.
    """
    if matrix.device.type != "cpu":
        return function(matrix, *arguments, **options)
    with _ONE_AT_A_TIME:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return function(matrix, *arguments, **options)
        finally:
            torch.set_num_threads(threads)
