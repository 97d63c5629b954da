"""GPTQ where the loss sees errors only through the projection Uᵀ·E of the rows.

:mod:`.gptq`'s equation (1) holds for Uᵀ·e_i in place of e_i, and what the errors of other rows require comes back
through U: w_j − U·(Σ Uᵀ·e_i·L_ij/L_jj). The part outside the columns of U has H = 0 and is rounded to nearest. Errors
are fed along rows too, as in two-sided objectives (arXiv 2505.22988).
"""

import torch

from ..cancellation import CancelCheck
from ..formats import SolveSpace
from ..linalg import lapack
from .gptq import Columns, column_blocks
from .quadratic import Quadratic

__all__ = ["round_projected"]

_BLOCK = 128
_BLOCKS = 96  # columns of a block are not fed to each other; with this many blocks 1 % of the gain is lost


def round_projected(
    weight: torch.Tensor,
    scale: torch.Tensor,
    space: SolveSpace,
    quadratic: Quadratic,
    *,
    check: CancelCheck | None = None,
) -> torch.Tensor:
    """Quantized values (out, in) for a quadratic form with ``rows`` U and ``factor`` F.

    H = F·Fᵀ + λI makes L_ij/L_jj = f_i·p_j, so that all earlier errors fit into Σ f_i·(e_iᵀ·U), float32 (k, k).

    Args:
        weight: (out, in), any float dtype, in the stored basis.
        scale: effective scales, float32 (*counts).
    """
    column_weight, u = quadratic.column_weight, quadratic.rows
    assert quadratic.factor is not None and column_weight is not None and u is not None
    order = column_weight.argsort(stable=True)
    factor = quadratic.factor[order]
    columns = Columns(weight, scale, space, order)
    size = min(_BLOCK, max(8, len(order) // _BLOCKS))
    multipliers = _multipliers(factor, quadratic.dampening, list(column_blocks(0, len(order), size, check))[::-1])
    fed = torch.zeros(factor.shape[1], u.shape[1], device=u.device)
    for block in column_blocks(0, len(order), size, check):
        columns.round(block, (multipliers[block] @ fed) @ u.t())
        fed += factor[block].t() @ (columns.errors[block] @ u)
    return columns.qdata().contiguous()


def _multipliers(factor: torch.Tensor, dampening: float, blocks: list[slice]) -> torch.Tensor:
    """P, float32 (in, k), with L_ij/L_jj = f_i·p_j for i in a later block than j, L·Lᵀ = F·Fᵀ + λI.

    Eliminating the columns before a block leaves F·S·Fᵀ + λI of the rest, with S (k, k); nothing of size in² is made.
    """
    multipliers = torch.empty_like(factor)
    left = torch.eye(factor.shape[1], device=factor.device)
    for block in blocks:
        rows = factor[block]
        seen = rows @ left
        own = seen @ rows.t()
        own.diagonal().add_(dampening)
        lower = lapack(torch.linalg.cholesky_ex, own).L
        solved = lapack(torch.linalg.solve_triangular, lower, seen, upper=False)
        multipliers[block] = solved / lower.diagonal()[:, None]
        left -= solved.t() @ solved
    return multipliers
