"""Packed storage of a symmetric matrix (n, n): the lower triangle as one contiguous vector.

The matrix is split into panels of 2048 columns. Each panel stores the rows from its own diagonal block to the last row,
row-major; the panels follow one another from left to right. The vector has 54 % of the elements of the matrix for
n = 12,288 and all of them for n ≤ 2048.
"""

from collections.abc import Iterator

import torch

__all__ = ["iter_panels", "packed_size", "unpack_symmetric"]

_WIDTH = 2048


def iter_panels(packed: torch.Tensor, size: int) -> Iterator[tuple[int, int, torch.Tensor]]:
    """Yield (start, stop, view (size − start, stop − start)) for each panel of a packed (size, size) matrix."""
    offset = 0
    for start in range(0, size, _WIDTH):
        stop = min(start + _WIDTH, size)
        elements = (size - start) * (stop - start)
        yield start, stop, packed[offset : offset + elements].view(size - start, stop - start)
        offset += elements


def packed_size(size: int) -> int:
    """Number of elements of a packed (size, size) matrix."""
    return sum((size - start) * (min(start + _WIDTH, size) - start) for start in range(0, size, _WIDTH))


def unpack_symmetric(packed: torch.Tensor, size: int) -> torch.Tensor:
    """Expand a packed matrix to float32 (size, size) on its device."""
    matrix = torch.empty(size, size, dtype=torch.float32, device=packed.device)
    for start, stop, panel in iter_panels(packed, size):
        matrix[start:, start:stop] = panel
        matrix[start:stop, stop:] = panel[stop - start :].t()
    return matrix
