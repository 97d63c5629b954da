"""GPTQ: column by column, the error of each column fed forward to the columns not yet rounded.

With the Cholesky factor H + λI = L·Lᵀ of the columns in ascending order of their diagonal, loss² = ‖E·L‖², and column
j of E·L contains e_j and the errors of the columns after it. From the last column to the first, each is rounded to

    q_j = round((w_j − Σ_{i>j} e_i·L_ij/L_jj) / s_j)                                                              (1)

This is GPTQ/OPTQ, equivalent to LDLQ (arXiv 2210.17323, 2307.13304), with one factorization and without an inverse of H.

Instead of one rounding, a beam search carries the partial roundings of least loss through a block of columns. With
L_jj²·(q_j·s_j − t_j)², t_j being the number that (1) divides by s_j, the squares of column j of E·L add up to the loss.

Coordinate descent afterwards passes over the columns and sets each quantized value to the best one given all others,
which is (1) with H_ij/H_jj for all i ≠ j: the loss never rises (arXiv 2309.01885).
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from ... import kernels
from ...kernels.element_format import ElementArithmetic
from ..cancellation import CancelCheck
from ..errors import CalibrationError
from ..formats import SolveSpace
from ..linalg import is_factored, lapack
from .quadratic import Quadratic

__all__ = ["Columns", "Factorization", "column_blocks", "default_beam_width", "factorize", "round_gptq"]

_PANEL = 1024  # columns to which the errors of all others are fed in one product, large enough to fill a GPU
_BLOCK = 128  # columns that one kernel rounds
_TO_ZERO = 2.0**100  # divisor for groups with the scale 0, whose quantized values must be 0


# Elements → default beam width on a GPU; "levels" are those of W4A8 and W6A8. Floating elements of 8 bits gain 1 %, all
# others 3 to 4 % of the squared loss; a width of 8 gains 2 % more and takes up to 1.6 × the time (benchmarks/README.md).
_BEAM_WIDTHS = {"levels": 4, "INT8": 4, "INT4": 4, "E2M1": 4, "E4M3": 1, "E5M2": 1}


@dataclass(frozen=True)
class Factorization:
    """H + λI with its columns in the order in which they are rounded.

    Attributes:
        order: the columns by ascending diagonal, int64 (in,).
        unit: L_ij/L_jj, float32 (in, in), L being the Cholesky factor.
        diagonal: H_jj, float32 (in,).
        pivots: L_jj², float32 (in,).
        dampening: λ.
        coupling: H with zeros on the diagonal, float32 (in, in), for coordinate descent; None without.
    """

    order: torch.Tensor
    unit: torch.Tensor
    diagonal: torch.Tensor
    pivots: torch.Tensor
    dampening: float
    coupling: torch.Tensor | None

    @cached_property
    def feedback(self) -> dict[int, torch.Tensor]:
        """First column of a block → L_ij/L_jj of its columns for i > j, else 0, float32 (block, block)."""
        return {block.start: self.unit[block, block].tril(-1) for block in _all_blocks(len(self.unit))}

    @cached_property
    def descent(self) -> dict[int, torch.Tensor]:
        """First column of a block → H_ij/(H_jj + λ) of its columns for i ≠ j, else 0, float32 (block, block)."""
        assert self.coupling is not None
        divisor = self.diagonal + self.dampening
        return {block.start: self.coupling[block, block] / divisor[block] for block in _all_blocks(len(divisor))}


def factorize(
    quadratic: Quadratic, channels: int, device: torch.device, *, passes: int = 0, like: Factorization | None = None
) -> Factorization:
    """Factor H + λI of a quadratic form without ``rows``.

    Args:
        passes: number of coordinate-descent passes that the factorization is for.
        like: factorization of the same H with another λ, for as many passes: its order and coupling are shared.

    Raises:
        CalibrationError: the Hessian is not positive semi-definite.
    """
    if like is not None:
        order = like.order
    elif quadratic.column_weight is None:
        order = torch.arange(channels, device=device)
    else:
        order = quadratic.column_weight.argsort(stable=True)
    coupling, undamped = None if like is None else like.coupling, replace(quadratic, dampening=0.0)
    matrix = undamped.matrix(order) if coupling is None else coupling.clone()
    diagonal = matrix.diagonal().clone() if like is None else like.diagonal
    if passes and coupling is None:
        coupling = matrix.clone().fill_diagonal_(0)
    extra = 0.0
    for attempt in range(6):
        matrix.diagonal().copy_(diagonal + quadratic.dampening).add_(extra)
        info = torch.empty((), dtype=torch.int32, device=device)
        factor = matrix.mT  # the same matrix, in the layout that LAPACK factors in place
        lapack(torch.linalg.cholesky_ex, factor, out=(factor, info))
        if is_factored(factor, info):
            pivots = factor.diagonal().clone()
            unit = factor.div_(pivots)
            return Factorization(order, unit, diagonal, pivots.square_(), quadratic.dampening, coupling)
        # Rounding errors have made a nearly singular H indefinite.
        extra = 10.0 ** (attempt - 4) * float(diagonal.mean() + quadratic.dampening)
        matrix = undamped.matrix(order) if coupling is None else coupling.clone()
    raise CalibrationError("The Hessian is not positive semi-definite; calibrate again.")


def default_beam_width(space: SolveSpace, device: torch.device) -> int:
    """The beam width of :func:`round_gptq` for a format; 1 on a CPU, where plain torch takes 40 times as long for 8."""
    if device.type == "cpu":
        return 1
    return _BEAM_WIDTHS["levels" if space.levels else space.elements.name]


def round_gptq(
    weight: torch.Tensor,
    scale: torch.Tensor,
    space: SolveSpace,
    quadratic: Quadratic,
    *,
    passes: int = 0,
    beam_width: int = 1,
    parts: int = 1,
    factorization: Factorization | None = None,
    check: CancelCheck | None = None,
) -> torch.Tensor:
    """Quantized values (out, in) by GPTQ and ``passes`` of coordinate descent.

    Args:
        weight: (out, in), any float dtype, in the stored basis.
        scale: effective scales, float32 (*counts).
        quadratic: without ``rows``; :func:`~.projected.round_projected` is for those.
        beam_width: number of partial roundings of each row that are kept within a block of columns.
        parts: round the rows in this many parts, for less memory.
        factorization: that of ``quadratic`` for ``passes``, where it is known.

    Raises:
        CalibrationError: the Hessian is not positive semi-definite.
    """
    if factorization is None:
        factorization = factorize(quadratic, weight.shape[1], weight.device, passes=passes)
    qdata = torch.empty(weight.shape, dtype=space.elements.dtype, device=weight.device)
    for rows, scale_rows in _row_parts(weight.shape[0], parts, space):
        columns = Columns(weight[rows], scale[scale_rows], space.of_rows(rows), factorization.order)
        _feed_forward(columns, factorization, beam_width, check)
        for _ in range(passes):
            _descend(columns, factorization, check)
        qdata[rows] = columns.qdata()
    return qdata


def _feed_forward(columns: "Columns", factorization: Factorization, beam_width: int, check: CancelCheck | None) -> None:
    """Round all columns by (1), or by a beam search in each block."""
    unit = factorization.unit
    for panel in column_blocks(0, len(unit), _PANEL, check):
        shift = unit[panel.stop :, panel].t() @ columns.errors[panel.stop :]
        for block in column_blocks(panel.start, panel.stop, _BLOCK, check):
            done, own = slice(block.stop, panel.stop), shift[block.start - panel.start : block.stop - panel.start]
            if done.start < done.stop:
                own.addmm_(unit[done, block].t(), columns.errors[done])
            coupling = factorization.feedback[block.start]
            if beam_width == 1:
                columns.round(block, own, coupling)
            else:
                columns.search(block, own, coupling, factorization.pivots[block], beam_width)


def _descend(columns: "Columns", factorization: Factorization, check: CancelCheck | None) -> None:
    """One pass of coordinate descent over all columns."""
    coupling, errors = factorization.coupling, columns.errors
    assert coupling is not None
    diagonal = factorization.diagonal + factorization.dampening
    for panel in column_blocks(0, len(coupling), _PANEL, check):
        shift = coupling[panel, panel.stop :] @ errors[panel.stop :]
        shift.addmm_(coupling[panel, : panel.start], errors[: panel.start])
        for block in column_blocks(panel.start, panel.stop, _BLOCK, check):
            own = shift[block.start - panel.start : block.stop - panel.start]
            own.addmm_(coupling[block, panel], errors[panel]).div_(diagonal[block, None])
            columns.round(block, own, factorization.descent[block.start], again=True)


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
        self._codes = self._level_scale = None
        if levels := space.levels:
            assert levels.scale is not None
            self._codes, self._level_scale = levels.codes, levels.scale.t()[order // levels.columns]

    def round(
        self, block: slice, shift: torch.Tensor, coupling: torch.Tensor | None = None, *, again: bool = False
    ) -> None:
        """Round the columns of ``block``, see :func:`~learned_rounding.kernels.round_block`; ``again``: replace their errors."""
        values, errors = self._values[block], self.errors[block]
        kernels.round_block(
            self._weight[block],
            shift,
            errors if again else None,
            coupling,
            *self._scales(block),
            *self._levels(block),
            out=(values, errors),
        )

    def search(
        self, block: slice, shift: torch.Tensor, coupling: torch.Tensor, column_cost: torch.Tensor, beam_width: int
    ) -> None:
        """Round the columns of ``block`` by a beam search, see :func:`~learned_rounding.kernels.round_block_beam`."""
        kernels.round_block_beam(
            self._weight[block],
            shift,
            coupling,
            column_cost,
            *self._scales(block),
            beam_width,
            *self._levels(block),
            out=(self._values[block], self.errors[block]),
        )

    def _scales(self, block: slice) -> tuple[torch.Tensor, int, ElementArithmetic]:
        """Scales of the columns of ``block``, the height of their groups, and the arithmetic of the elements."""
        scale = self._scale if self._scale.shape[0] == 1 else self._scale[block]
        return scale, self._group_rows, self._elements.arithmetic

    def _levels(self, block: slice) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Codes of the levels, and the scales of these in the columns of ``block``; None without levels."""
        return self._codes, None if self._level_scale is None else self._level_scale[block]

    def qdata(self) -> torch.Tensor:
        """Quantized values (rows, in), in the weight's own order of columns."""
        return self._values[self._order.argsort()].t().to(self._elements.dtype)


def _all_blocks(count: int) -> Iterator[slice]:
    """The blocks of all panels of ``count`` columns."""
    for panel in column_blocks(0, count, _PANEL, None):
        yield from column_blocks(panel.start, panel.stop, _BLOCK, None)


def column_blocks(start: int, stop: int, size: int, check: CancelCheck | None) -> Iterator[slice]:
    """Blocks of the columns start:stop, the last ones first."""
    for high in range(stop, start, -size):
        if check:
            check()
        yield slice(max(start, high - size), high)


def _row_parts(out: int, parts: int, space: SolveSpace) -> Iterator[tuple[slice, slice]]:
    """Rows, and the rows of scales that belong to them; whole groups, where these have several rows."""
    groups = space.groups
    several = groups.counts[0] > 1
    height = -(-out // parts // groups.rows) * groups.rows if several else -(-out // parts)
    for top in range(0, out, height):
        stop = min(out, top + height)
        yield slice(top, stop), slice(top // groups.rows, -(-stop // groups.rows)) if several else slice(None)
