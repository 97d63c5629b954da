"""Sequential rounding: column by column, each column's error fed forward to those not yet rounded.

With the Cholesky factor H + λI = L·Lᵀ of the columns in ascending order of their diagonal, loss² = ‖E·L‖², and column
j of E·L holds e_j and the errors of the columns after it. Going from the last column to the first, each column is
therefore rounded to

    q_j = round((w_j − Σ_{i>j} e_i·L_ij/L_jj) / s_j)                                                              (1)

This is GPTQ/OPTQ = LDLQ (arXiv 2210.17323, 2307.13304), written so that one factorisation suffices and H is never
inverted. It ends on the grid.

Where the loss sees the errors only through Uᵀ, (1) holds for Uᵀ·e_i in place of e_i, and what other rows' errors ask
for comes back through U: w_j − U·(Σ Uᵀ·e_i·L_ij/L_jj). The part outside U's columns has H = 0 and is left alone.

Coordinate descent afterwards sweeps over the columns and sets each code to the best one given all others, which is (1)
with H_ij/H_jj for all i ≠ j: the loss never rises.
"""

from collections.abc import Iterator

import torch

from ... import kernels
from ..cancellation import CancelCheck
from ..errors import CalibrationError
from ..formats import Grid, Tiles
from ..linalg import lapack
from .objectives import Quadratic

__all__ = ["round_sequential", "memory_bytes"]

_BLOCK = 128  # columns a kernel rounds in one go
_PROJECTED_BLOCKS = 96  # with U the columns of a block are not fed to each other; so many blocks lose 1 % of the gain


def memory_bytes(out: int, inner: int, parts: int, *, sweeps: int = 0) -> int:
    """Peak of what :func:`round_sequential` allocates, beside the weight, its codes and the quadratic form.

    8·in² while H + λI is put in order, to be factored in place; then 4·in², and 18·⌈out/parts⌉·in for the columns, their
    errors and values, and a copy of each while it is put in order. Sweeps need 4·in² more.
    """
    more = 4 * inner**2 if sweeps else 0
    return more + max(8 * inner**2, 4 * inner**2 + 18 * -(-out // parts) * inner)


def _unit_factor(quadratic: Quadratic, order: torch.Tensor) -> torch.Tensor:
    """L_ij/L_jj, float32 (in, in): the Cholesky factor of H + λI, columns divided by its diagonal."""
    matrix = quadratic.matrix(order)
    extra = 1e-4 * float(matrix.diagonal().mean())
    for _ in range(6):
        info = torch.empty((), dtype=torch.int32, device=matrix.device)
        factor = matrix.mT  # the same matrix, laid out as the factorisation wants it to work in place
        lapack(torch.linalg.cholesky_ex, factor, out=(factor, info))
        if not info:
            return factor.div_(factor.diagonal().clone())
        matrix = quadratic.matrix(order)  # rounding errors have made a nearly singular H indefinite
        matrix.diagonal().add_(extra)
        extra *= 10
    raise CalibrationError("The Gram is not positive semi-definite, so it is no Gram; calibrate again.")


def _pull(quadratic: Quadratic, order: torch.Tensor) -> torch.Tensor:
    """H_ij/H_jj with zeros on the diagonal, float32 (in, in)."""
    matrix = quadratic.matrix(order)
    matrix.div_(matrix.diagonal().clone()).fill_diagonal_(0)
    return matrix


class _Columns:
    """The columns of some rows of a weight in the order they are rounded: transposed, permuted, with their scales."""

    def __init__(self, weight: torch.Tensor, scale: torch.Tensor, tiles: Tiles, order: torch.Tensor, grid: Grid):
        self.weight = weight.t()[order].float()
        self.errors = torch.zeros_like(self.weight)
        self._values = torch.empty(self.weight.shape, dtype=torch.float16, device=weight.device)
        scale = scale.t().contiguous()
        self._scale = scale if scale.shape[0] == 1 else scale[order // tiles.columns]
        self._tile_rows = tiles.rows if scale.shape[1] > 1 else self.weight.shape[1]
        self._order, self._grid = order, grid

    def round(
        self, block: slice, shift: torch.Tensor, coupling: torch.Tensor | None = None, *, again: bool = False
    ) -> None:
        """Round the columns of ``block``, see :func:`~learned_rounding.kernels.round_block`; ``again``: replace errors."""
        self._values[block], self.errors[block] = kernels.round_block(
            self.weight[block],
            shift,
            self.errors[block] if again else None,
            coupling,
            self._scale if self._scale.shape[0] == 1 else self._scale[block],
            self._tile_rows,
            self._grid.arithmetic,
        )

    def codes(self) -> torch.Tensor:
        """(rows, in), in the weight's own order."""
        return self._values[self._order.argsort()].t().to(self._grid.dtype)


def _blocks(count: int, size: int, check: CancelCheck | None) -> Iterator[slice]:
    """Blocks of columns, the last ones first."""
    for high in range(count, 0, -size):
        if check:
            check()
        yield slice(max(0, high - size), high)


def _feed_forward(columns: _Columns, unit: torch.Tensor, check: CancelCheck | None) -> None:
    for block in _blocks(len(unit), _BLOCK, check):
        done = slice(block.stop, None)
        shift = unit[done, block].t() @ columns.errors[done]
        columns.round(block, shift, unit[block, block].tril(-1))


def _feed_forward_projected(columns: _Columns, quadratic: Quadratic, order: torch.Tensor, check: CancelCheck | None):
    """(1) within U, and H = F·Fᵀ + λI: L_ij/L_jj = f_i·p_j, so that all earlier errors fit into Σ f_i·(e_iᵀ·U)."""
    factor, u = quadratic.factor[order], quadratic.rows
    size = min(_BLOCK, max(8, len(order) // _PROJECTED_BLOCKS))
    pulls = _low_rank_factor(factor, quadratic.damping, list(_blocks(len(order), size, check))[::-1])
    fed = torch.zeros(factor.shape[1], u.shape[1], device=u.device)
    for block in _blocks(len(order), size, check):
        columns.round(block, (pulls[block] @ fed) @ u.t())
        fed += factor[block].t() @ (columns.errors[block] @ u)


def _low_rank_factor(factor: torch.Tensor, damping: float, blocks: list[slice]) -> torch.Tensor:
    """P, float32 (in, k), with L_ij/L_jj = f_i·p_j for i in a later block than j, L·Lᵀ = F·Fᵀ + λI.

    Elimination of the columns before a block leaves F·S·Fᵀ + λI of the rest, with S (k, k); nothing of size in² is made.
    """
    pulls = torch.empty_like(factor)
    left = torch.eye(factor.shape[1], device=factor.device)
    for block in blocks:
        rows = factor[block]
        seen = rows @ left
        own = seen @ rows.t()
        own.diagonal().add_(damping)
        lower = lapack(torch.linalg.cholesky_ex, own).L
        solved = lapack(torch.linalg.solve_triangular, lower, seen, upper=False)
        pulls[block] = solved / lower.diagonal()[:, None]
        left -= solved.t() @ solved
    return pulls


def _descend(columns: _Columns, pull: torch.Tensor, check: CancelCheck | None) -> None:
    for block in _blocks(len(pull), _BLOCK, check):
        shift = pull[:, block].t() @ columns.errors
        columns.round(block, shift, pull[block, block], again=True)


def _row_parts(out: int, parts: int, tiles: Tiles) -> Iterator[tuple[slice, slice]]:
    """Rows, and the rows of tiles they lie in; whole tiles, where these have a limited height."""
    tiled = tiles.counts[0] > 1
    height = -(-out // parts // tiles.rows) * tiles.rows if tiled else -(-out // parts)
    for top in range(0, out, height):
        stop = min(out, top + height)
        yield slice(top, stop), slice(top // tiles.rows, -(-stop // tiles.rows)) if tiled else slice(None)


def round_sequential(
    weight: torch.Tensor,
    scale: torch.Tensor,
    grid: Grid,
    tiles: Tiles,
    quadratic: Quadratic,
    *,
    sweeps: int = 0,
    parts: int = 1,
    check: CancelCheck | None = None,
) -> torch.Tensor:
    """Codes (out, in) of ``grid.dtype`` by sequential rounding and ``sweeps`` of coordinate descent (without U only).

    Args:
        weight: (out, in), any float dtype.
        scale: float32, one per tile.
        parts: round the rows in so many parts, for less memory; with U they depend on each other and stay together.
    """
    out, inner = weight.shape
    seen = quadratic.column_weight
    order = torch.arange(inner, device=weight.device) if seen is None else seen.argsort(stable=True)
    projected = quadratic.rows is not None
    unit = None if projected else _unit_factor(quadratic, order)
    pull = _pull(quadratic, order) if sweeps else None
    codes = torch.empty(weight.shape, dtype=grid.dtype, device=weight.device)
    for rows, tile_rows in _row_parts(out, 1 if projected else parts, tiles):
        columns = _Columns(weight[rows], scale[tile_rows], tiles, order, grid)
        if projected:
            _feed_forward_projected(columns, quadratic, order, check)
        else:
            _feed_forward(columns, unit, check)
        for _ in range(sweeps):
            _descend(columns, pull, check)
        codes[rows] = columns.codes()
    return codes
