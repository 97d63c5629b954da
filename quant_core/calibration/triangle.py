"""8-bit storage of a Cholesky factor of correlations: half of the bytes of float16 correlations, and always positive definite.

An error of 8-bit correlations C is noise with eigenvalues of either sign, of the size of the dampening for thousands of
channels. With C = L·Lᵀ and rows of L of unit norm, the error δL of an 8-bit factor adds ‖δLᵀv‖² ≈ 1e-4·‖v‖² to vᵀCv where C
itself is small: less than any dampening in use.
"""

import torch

from ..errors import CalibrationError
from ..linalg import is_factored, lapack
from .panels import iter_panels, packed_size
from .products import matmul_operand, multiply

__all__ = ["SEGMENT", "decode_triangle", "encode_triangle", "segment_count"]

SEGMENT = 256  # columns of a panel; each of its rows has one scale
_LARGEST = 127
_SMALLEST = torch.finfo(torch.float32).tiny  # scale; the quotient by a smaller one may exceed the largest level
_JITTERS = (1e-4, 1e-3, 1e-2, 1e-1)  # added to the diagonal, 1, until rounding errors leave C positive definite
_COLUMNS = 2048  # columns of C that are multiplied at once


def segment_count(size: int) -> int:
    """Number of scales of a factor (size, size)."""
    return sum(size - start for start in range(0, size, SEGMENT))


def encode_triangle(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Factor correlations C, float32 (n, n), and round the factor to 8 bits.

    Returns:
        levels int8 (packed_size(n, SEGMENT),) of the factor below its diagonal, scales float32 (segment_count(n),) and the
        diagonal float32 (n,).

    Raises:
        CalibrationError: C is not positive semi-definite, or not finite.
    """
    size = len(matrix)
    factor = _factor(matrix)
    diagonal = factor.diagonal().clone()
    factor.fill_diagonal_(0)
    levels = torch.empty(packed_size(size, SEGMENT), dtype=torch.int8, device=matrix.device)
    scales = []
    for start, stop, panel in iter_panels(levels, size, SEGMENT):
        values = factor[start:, start:stop]
        scale = (values.abs().amax(dim=1) / _LARGEST).clamp_(min=_SMALLEST)
        panel.copy_((values / scale[:, None]).round_())
        scales.append(scale)
    return levels, torch.cat(scales), diagonal


def _factor(matrix: torch.Tensor) -> torch.Tensor:
    for jitter in _JITTERS:
        dampened = matrix.clone()
        dampened.diagonal().add_(jitter)
        factor, info = lapack(torch.linalg.cholesky_ex, dampened)
        if is_factored(factor, info):
            return factor
    raise CalibrationError("The Hessian is not positive semi-definite; calibrate again.")


def decode_triangle(levels: torch.Tensor, scales: torch.Tensor, diagonal: torch.Tensor) -> torch.Tensor:
    """C = L·Lᵀ, float32 (n, n), on the device of the arguments.

    Elements of L are at most 1, so float16 holds 8-bit levels times their scale with a relative error of 2e-4.
    """
    size = len(diagonal)
    factor = torch.zeros(size, size, dtype=torch.float16 if levels.is_cuda else torch.float32, device=levels.device)
    rows = 0
    for start, stop, panel in iter_panels(levels, size, SEGMENT):
        factor[start:, start:stop] = panel * scales[rows : rows + size - start, None]
        rows += size - start
    factor.diagonal().copy_(diagonal)
    factor = matmul_operand(factor)
    matrix = torch.empty(size, size, device=levels.device)
    for start in range(0, size, _COLUMNS):
        stop = min(start + _COLUMNS, size)
        part = multiply(factor[start:, :stop], factor[start:stop, :stop].t())
        matrix[start:, start:stop] = part
        matrix[start:stop, stop:] = part[stop - start :].t()
    return matrix
