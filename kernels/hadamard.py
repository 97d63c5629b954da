"""Regular Hadamard rotation of ConvRot."""

import functools

import torch

__all__ = ["hadamard", "rotate"]

_LARGEST_MATRIX = 256  # order up to which the product is with one matrix
_H4 = ((1, 1, 1, -1), (1, 1, -1, 1), (1, -1, 1, 1), (-1, 1, 1, 1))


@functools.cache
def hadamard(size: int) -> torch.Tensor:
    """Orthogonal regular Hadamard matrix H₄⊗H₄⊗… of order ``size``, a power of four; float32 on the CPU.

    The matrix is symmetric and therefore its own inverse. Its entries ±1/√size are exact in every float dtype.
    """
    base = torch.tensor(_H4, dtype=torch.float32) / 2
    matrix = base
    while matrix.shape[0] < size:
        matrix = torch.kron(matrix, base)
    return matrix


def rotate(values: torch.Tensor, size: int) -> torch.Tensor:
    """Multiply groups of ``size`` adjacent channels (last dimension) by the Hadamard matrix; returns float32.

    The matrix of a larger group is a Kronecker product A⊗B of two, each of which is applied to its own index of a channel.
    """
    inner = min(size, _LARGEST_MATRIX)
    groups = values.float().unflatten(-1, (-1, inner)) @ hadamard(inner).to(values.device)
    if size > inner:
        outer = groups.unflatten(-2, (-1, size // inner)).transpose(-1, -2)
        groups = rotate(outer, size // inner).transpose(-1, -2).flatten(-3, -2)
    return groups.flatten(-2)
