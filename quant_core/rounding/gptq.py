"""GPTQ: column by column, the error of each column fed forward to the columns not yet rounded.

With the Cholesky factor H + λI = L·Lᵀ of the columns in ascending order of their diagonal, loss² = ‖E·L‖², and column
j of E·L contains e_j and the errors of the columns after it. From the last column to the first, each is rounded to

    q_j = round((w_j − Σ_{i>j} e_i·L_ij/L_jj) / s_j)                                                              (1)

This is GPTQ/OPTQ, equivalent to LDLQ (arXiv 2210.17323, 2307.13304), with one factorization and without an inverse of H.

Coordinate descent afterwards passes over the columns and sets each quantized value to the best one given all others,
which is (1) with H_ij/H_jj for all i ≠ j: the loss never rises (arXiv 2309.01885).
"""

from collections.abc import Iterator

import torch

from ... import kernels
from ..cancellation import CancelCheck
from ..errors import CalibrationError
from ..formats import SolveSpace
from ..linalg import lapack
from .quadratic import Quadratic

__all__ = ["Columns", "column_blocks", "round_gptq"]

_BLOCK = 128  # columns that one kernel rounds
_TO_ZERO = 2.0**100  # divisor for groups with the scale 0, whose quantized values must be 0


def round_gptq(
    weight: torch.Tensor,
    scale: torch.Tensor,
    space: SolveSpace,
    quadratic: Quadratic,
    *,
    passes: int = 0,
    parts: int = 1,
    check: CancelCheck | None = None,
) -> torch.Tensor:
    """Quantized values (out, in) by GPTQ and ``passes`` of coordinate descent.

    Args:
        weight: (out, in), any float dtype, in the stored basis.
        scale: effective scales, float32 (*counts).
        quadratic: without ``rows``; :func:`~.projected.round_projected` is for those.
        parts: round the rows in this many parts, for less memory.

    Raises:
        CalibrationError: the Hessian is not positive semi-definite.
    """
    diagonal = quadratic.column_weight
    order = torch.arange(weight.shape[1], device=weight.device) if diagonal is None else diagonal.argsort(stable=True)
    unit = _unit_factor(quadratic, order)
    coupling = _coupling(quadratic, order) if passes else None
    qdata = torch.empty(weight.shape, dtype=space.elements.dtype, device=weight.device)
    for rows, scale_rows in _row_parts(weight.shape[0], parts, space):
        columns = Columns(weight[rows], scale[scale_rows], space, order)
        for block in column_blocks(len(unit), _BLOCK, check):
            done = slice(block.stop, None)
            columns.round(block, unit[done, block].t() @ columns.errors[done], unit[block, block].tril(-1))
        for _ in range(passes):
            assert coupling is not None
            for block in column_blocks(len(unit), _BLOCK, check):
                columns.round(block, coupling[:, block].t() @ columns.errors, coupling[block, block], again=True)
        qdata[rows] = columns.qdata()
    return qdata


class Columns:
    """The columns of some rows of a weight in the order in which they are rounded: transposed, permuted, with their scales.

    Attributes:
        errors: e = s·q − w, float32 (in, rows), 0 for columns that are not yet rounded.
    """

    def __init__(self, weight: torch.Tensor, scale: torch.Tensor, space: SolveSpace, order: torch.Tensor):
        self._weight = weight.t()[order].float()
        self.errors = torch.zeros_like(self._weight)
        self._values = torch.empty(self._weight.shape, dtype=torch.float16, device=weight.device)
        if not space.scales.continuous:
            scale = torch.where(scale > 0, scale, torch.full_like(scale, _TO_ZERO))
        scale = scale.t().contiguous()
        self._scale = scale if scale.shape[0] == 1 else scale[order // space.groups.columns]
        self._group_rows = space.groups.rows if scale.shape[1] > 1 else self._weight.shape[1]
        self._order, self._elements = order, space.elements

    def round(
        self, block: slice, shift: torch.Tensor, coupling: torch.Tensor | None = None, *, again: bool = False
    ) -> None:
        """Round the columns of ``block``, see :func:`~learned_rounding.kernels.round_block`; ``again``: replace their errors."""
        self._values[block], self.errors[block] = kernels.round_block(
            self._weight[block],
            shift,
            self.errors[block] if again else None,
            coupling,
            self._scale if self._scale.shape[0] == 1 else self._scale[block],
            self._group_rows,
            self._elements.arithmetic,
        )

    def qdata(self) -> torch.Tensor:
        """Quantized values (rows, in), in the weight's own order of columns."""
        return self._values[self._order.argsort()].t().to(self._elements.dtype)


def column_blocks(count: int, size: int, check: CancelCheck | None) -> Iterator[slice]:
    """Blocks of columns, the last ones first."""
    for high in range(count, 0, -size):
        if check:
            check()
        yield slice(max(0, high - size), high)


def _unit_factor(quadratic: Quadratic, order: torch.Tensor) -> torch.Tensor:
    """L_ij/L_jj, float32 (in, in): the Cholesky factor of H + λI, columns divided by its diagonal."""
    matrix = quadratic.matrix(order)
    extra = 1e-4 * float(matrix.diagonal().mean())
    for _ in range(6):
        info = torch.empty((), dtype=torch.int32, device=matrix.device)
        factor = matrix.mT  # the same matrix, in the layout that LAPACK factors in place
        lapack(torch.linalg.cholesky_ex, factor, out=(factor, info))
        if not info:
            return factor.div_(factor.diagonal().clone())
        matrix = quadratic.matrix(order)  # rounding errors have made a nearly singular H indefinite
        matrix.diagonal().add_(extra)
        extra *= 10
    raise CalibrationError("The Hessian is not positive semi-definite; calibrate again.")


def _coupling(quadratic: Quadratic, order: torch.Tensor) -> torch.Tensor:
    """H_ij/H_jj with zeros on the diagonal, float32 (in, in)."""
    matrix = quadratic.matrix(order)
    return matrix.div_(matrix.diagonal().clone()).fill_diagonal_(0)


def _row_parts(out: int, parts: int, space: SolveSpace) -> Iterator[tuple[slice, slice]]:
    """Rows, and the rows of scales that belong to them; whole groups, where these have several rows."""
    groups = space.groups
    several = groups.counts[0] > 1
    height = -(-out // parts // groups.rows) * groups.rows if several else -(-out // parts)
    for top in range(0, out, height):
        stop = min(out, top + height)
        yield slice(top, stop), slice(top // groups.rows, -(-stop // groups.rows)) if several else slice(None)
