"""What a rounding minimises: a quadratic form of the error E = Ŵ − W.

An objective is a value with one method, ``quadratic(weight)``, which says what it means for a weight. All solvers work
on the :class:`Quadratic` it returns, so a new objective is a new class in this file.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch

from .svd import leading_singular_vectors

__all__ = ["Quadratic", "Objective", "Identity", "Calibrated", "Principal", "principal_rank"]

# The share of the allowed weight error that principal rounding aims at, so that it seldom has to be repeated.
_MARGIN = 0.9


@dataclass(frozen=True)
class Quadratic:
    """loss(E)² = tr(Uᵀ·E·H·Eᵀ·U), and what solvers minimise is loss(E)² + λ‖E‖².

    Attributes:
        hessian: H, float32 (in, in); None when it is given by ``factor``, or is I.
        factor: F, float32 (in, k), with H = F·Fᵀ; None when H is given, or is I.
        rows: U, float32 (out, k) with orthonormal columns, beside a ``factor``; None for I.
        row_weight: float32 (out,), not negative: the weight of each output channel in the loss; None for ones.
        damping: λ.
        weight_bound: codes may have at most this many times the weight error of nearest; None for any.
    """

    hessian: torch.Tensor | None = None
    factor: torch.Tensor | None = None
    rows: torch.Tensor | None = None
    row_weight: torch.Tensor | None = None
    damping: float = 0.0
    weight_bound: float | None = None

    @cached_property
    def column_weight(self) -> torch.Tensor | None:
        """What the square of an error in each column costs, averaged over rows, (in,); None when all cost the same.

        Without U that is the diagonal of H + λI; the diagonal of U·Uᵀ has the mean k/out.
        """
        if self.hessian is not None:
            return self.hessian.diagonal() + self.damping
        if self.factor is None:
            return None
        share = 1.0 if self.rows is None else self.rows.shape[1] / self.rows.shape[0]
        return self.factor.square().sum(dim=1) * share + self.damping

    def matrix(self, order: torch.Tensor) -> torch.Tensor:
        """H + λI as a new float32 matrix (in, in), columns and rows taken in ``order``."""
        if self.hessian is not None:  # in two steps: indexing by both at once would make index matrices of that size
            matrix = self.hessian.index_select(0, order).index_select(1, order)
        elif self.factor is not None:
            matrix = self.factor[order] @ self.factor[order].t()
        else:
            matrix = torch.eye(len(order), device=order.device)
        matrix.diagonal().add_(self.damping)
        return matrix

    def gradient(self, error: torch.Tensor, *, exact: bool = True) -> torch.Tensor:
        """U·Uᵀ·E·H + λE: half the gradient of what solvers minimise, float32 (out, in).

        ``exact`` False allows a bfloat16 product on a GPU, see :meth:`loss`.
        """
        seen = error if self.rows is None else self.rows @ (self.rows.t() @ error)
        if self.hessian is not None:
            seen = self._through_hessian(seen, exact)
        elif self.factor is not None:
            seen = (seen @ self.factor) @ self.factor.t()
        if self.row_weight is not None:
            seen = seen * self.row_weight[:, None]
        return seen + self.damping * error

    def loss(self, slabs: Iterable[tuple[int, int, torch.Tensor]], *, exact: bool = True) -> float:
        """√tr(Uᵀ·E·H·Eᵀ·U) of an error given as (start, stop, rows start:stop of E), without damping.

        ``exact`` False allows bfloat16 products on a GPU (relative error about 1e-3), ten times faster for large H.
        """
        total, projected = 0.0, 0.0
        for start, stop, error in slabs:
            if self.rows is not None:
                seen = error if self.factor is None else error @ self.factor
                projected = projected + self.rows[start:stop].t() @ seen
                continue
            if self.factor is not None:
                square = (error @ self.factor).square_()
            elif self.hessian is None:
                square = error.square()
            else:
                square = self._through_hessian(error, exact) * error
            per_row = square.sum(dim=1, dtype=torch.float64)
            total += float(per_row.sum() if self.row_weight is None else per_row @ self.row_weight[start:stop].double())
        if self.rows is not None:
            square = projected @ self.hessian * projected if self.hessian is not None else projected.square()
            total = float(square.sum(dtype=torch.float64))
        return max(total, 0.0) ** 0.5

    def _through_hessian(self, error: torch.Tensor, exact: bool) -> torch.Tensor:
        if exact or not error.is_cuda:
            return error @ self.hessian
        return (error.bfloat16() @ self._hessian16).float()

    @cached_property
    def _hessian16(self) -> torch.Tensor:
        return self.hessian.bfloat16()


class Objective(Protocol):
    """What a rounding minimises."""

    def quadratic(self, weight: torch.Tensor) -> Quadratic:
        """The quadratic form for a weight, float32 (out, in), on its device."""


@dataclass(frozen=True)
class Identity:
    """‖E‖: right for white inputs, and all there is to minimise when nothing is known."""

    def quadratic(self, weight: torch.Tensor) -> Quadratic:
        return Quadratic()


@dataclass(frozen=True)
class Calibrated:
    """√tr(E·H·Eᵀ): the error of the layer's output for inputs of Gram H.

    Attributes:
        gram: H, float32 (in, in), on the weight's device.
        damping: λ relative to the mean of H's diagonal.
        row_weight: float32 (out,), how much each output channel counts; None for equally.
    """

    gram: torch.Tensor
    damping: float = 0.01
    row_weight: torch.Tensor | None = None

    def quadratic(self, weight: torch.Tensor) -> Quadratic:
        mean = float(self.gram.diagonal().mean())
        if not mean > 0:  # inputs that are always zero say nothing
            return Quadratic(row_weight=self.row_weight)
        return Quadratic(hessian=self.gram, row_weight=self.row_weight, damping=self.damping * mean)


def principal_rank(shape: tuple[int, int], top_p: float, min_k: int, max_k: int) -> int:
    """k = min(max_k, max(min_k, ⌊top_p·min(out, in)⌋)), at least 1 and at most min(out, in)."""
    side = min(shape)
    return max(1, min(side, max_k, max(min_k, int(top_p * side))))


@dataclass(frozen=True)
class Principal:
    """‖Uᵀ·E·V‖, U and V the leading singular vectors of the weight: the error where the weight itself is strong.

    The error that is kept out of that subspace of k² dimensions goes into the others, and the less of it the loss
    leaves, the more the plain weight error grows. Sequential rounding shapes the noise so: within the rows' subspace
    it is divided by 1+λ in the columns' subspace and by λ elsewhere, at a constant product, hence

        (‖E‖/‖E nearest‖)² ≈ 1 − k/out + k/out·(p·r^(1−p) + (1−p)·r^(−p)),  r = λ/(1+λ),  p = k/in.

    λ is the smallest that keeps this within ``weight_cost``.

    Attributes:
        top_p, min_k, max_k: see :func:`principal_rank`.
        full_matrix: take U and V from the complete SVD.
        weight_cost: how much larger than that of nearest ‖E‖ may become: 0.03 allows 3 %.
        seed: of the truncated SVD.
    """

    top_p: float = 0.2
    min_k: int = 1
    max_k: int = 1280
    full_matrix: bool = False
    weight_cost: float = 0.03
    seed: int = 0

    def quadratic(self, weight: torch.Tensor) -> Quadratic:
        k = principal_rank(tuple(weight.shape), self.top_p, self.min_k, self.max_k)
        u, v = leading_singular_vectors(weight, k, seed=self.seed, full=self.full_matrix)
        damping = self._damping(k / weight.shape[0], k / weight.shape[1])
        return Quadratic(factor=v, rows=u, damping=damping, weight_bound=1 + self.weight_cost)

    def _damping(self, rows: float, columns: float) -> float:
        allowed = (1 + _MARGIN * self.weight_cost) ** 2

        def cost(r: float) -> float:
            return 1 - rows + rows * (columns * r ** (1 - columns) + (1 - columns) * r**-columns)

        low, high = -20.0, 0.0  # log2 of r; the cost falls as r grows
        for _ in range(50):
            middle = (low + high) / 2
            low, high = (middle, high) if cost(2**middle) > allowed else (low, middle)
        r = min(2**high, 1 - 2**-20)
        return r / (1 - r)
