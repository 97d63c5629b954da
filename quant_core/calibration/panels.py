"""Half of a symmetric matrix (n, n), as one line of numbers.

The matrix is cut into panels of 2048 columns. Of each only the rows from its own diagonal downwards are kept, row by
row; the panels follow each other from the left. That is 54 % of a matrix of n = 12,288 and all of one up to 2048.
"""

from collections.abc import Iterator

import torch

__all__ = ["packed_size", "panels", "unpack"]

_WIDTH = 2048


def panels(line: torch.Tensor, inner: int) -> Iterator[tuple[int, int, torch.Tensor]]:
    """(start, stop, view (n − start, stop − start)) of every panel of a packed ``line`` of an (n, n) matrix."""
    offset = 0
    for start in range(0, inner, _WIDTH):
        stop = min(start + _WIDTH, inner)
        size = (inner - start) * (stop - start)
        yield start, stop, line[offset : offset + size].view(inner - start, stop - start)
        offset += size


def packed_size(inner: int) -> int:
    """How many numbers the packed half of an (n, n) matrix holds."""
    return sum((inner - start) * (min(start + _WIDTH, inner) - start) for start in range(0, inner, _WIDTH))


def unpack(line: torch.Tensor, inner: int) -> torch.Tensor:
    """The symmetric float32 matrix (n, n) of a packed line, on its device."""
    matrix = torch.empty(inner, inner, dtype=torch.float32, device=line.device)
    for start, stop, panel in panels(line, inner):
        matrix[start:, start:stop] = panel
        matrix[start:stop, stop:] = panel[stop - start :].t()
    return matrix
