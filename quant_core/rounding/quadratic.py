"""What a rounding minimises: a quadratic form of the error E = Ŵ − W."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import torch

__all__ = ["Quadratic", "hessian_quadratic"]


@dataclass(frozen=True)
class Quadratic:
    """loss(E)² = tr(Uᵀ·E·H·Eᵀ·U); solvers minimise loss(E)² + λ‖E‖².

    Attributes:
        hessian: H, float32 (in, in); None when it is given by ``factor``, or is I.
        factor: F, float32 (in, k), with H = F·Fᵀ; None when H is given, or is I.
        rows: U, float32 (out, k) with orthonormal columns, together with a ``factor``; None for I.
        row_weight: float32 (out,), not negative: weight of each output channel in the loss; None for ones.
        dampening: λ.
        weight_bound: quantized values may have at most this many times the weight error of RTN; None for any.
    """

    hessian: torch.Tensor | None = None
    factor: torch.Tensor | None = None
    rows: torch.Tensor | None = None
    row_weight: torch.Tensor | None = None
    dampening: float = 0.0
    weight_bound: float | None = None

    @property
    def relative_dampening(self) -> float | None:
        """λ relative to the mean diagonal of H; None where H is not given."""
        return None if self.hessian is None else self.dampening / float(self.hessian.diagonal().mean())

    @cached_property
    def column_weight(self) -> torch.Tensor | None:
        """Cost of a squared error in each column, averaged over rows, (in,); None when it is the same for all.

        Without U that is the diagonal of H + λI; the diagonal of U·Uᵀ has the mean k/out.
        """
        if self.hessian is not None:
            return self.hessian.diagonal() + self.dampening
        if self.factor is None:
            return None
        share = 1.0 if self.rows is None else self.rows.shape[1] / self.rows.shape[0]
        return self.factor.square().sum(dim=1) * share + self.dampening

    def matrix(self, order: torch.Tensor) -> torch.Tensor:
        """H + λI as a new float32 matrix (in, in), columns and rows in ``order``."""
        if self.hessian is not None:  # in two steps: indexing both at once would make index matrices of that size
            matrix = self.hessian.index_select(0, order).index_select(1, order)
        elif self.factor is not None:
            matrix = self.factor[order] @ self.factor[order].t()
        else:
            matrix = torch.eye(len(order), device=order.device)
        matrix.diagonal().add_(self.dampening)
        return matrix

    def gradient(self, error: torch.Tensor, *, exact: bool = True) -> torch.Tensor:
        """U·Uᵀ·E·H + λE: half the gradient of what solvers minimise, float32 (out, in).

        ``exact`` False allows a bfloat16 product on a GPU, see :meth:`loss`.
        """
        seen = error if self.rows is None else self.rows @ (self.rows.t() @ error)
        if self.hessian is not None:
            seen = self._multiply_hessian(seen, exact)
        elif self.factor is not None:
            seen = (seen @ self.factor) @ self.factor.t()
        if self.row_weight is not None:
            seen = seen * self.row_weight[:, None]
        return seen + self.dampening * error

    def loss(self, slabs: Iterable[tuple[int, int, torch.Tensor]], *, exact: bool = True) -> float:
        """√tr(Uᵀ·E·H·Eᵀ·U) of an error given as (start, stop, rows start:stop of E), without dampening.

        ``exact`` False allows bfloat16 products on a GPU (relative error about 1e-3), ten times faster for large H.
        """
        # Sums of float64 on the device: one transfer for all slabs.
        total, projected = torch.zeros((), dtype=torch.float64), None
        for start, stop, error in slabs:
            if self.rows is not None:
                part = self.rows[start:stop].t() @ (error if self.factor is None else error @ self.factor)
                projected = part if projected is None else projected + part
                continue
            if self.factor is not None:
                square = (error @ self.factor).square_()
            elif self.hessian is None:
                square = error.square()
            else:
                square = self._multiply_hessian(error, exact) * error
            per_row = square.sum(dim=1, dtype=torch.float64)
            part = per_row.sum() if self.row_weight is None else per_row @ self.row_weight[start:stop].double()
            total = total.to(part.device) + part
        if projected is not None:
            square = projected @ self.hessian * projected if self.hessian is not None else projected.square()
            total = square.sum(dtype=torch.float64)
        return max(float(total), 0.0) ** 0.5

    def _multiply_hessian(self, error: torch.Tensor, exact: bool) -> torch.Tensor:
        assert self.hessian is not None
        if exact or not error.is_cuda:
            return error @ self.hessian
        return (error.bfloat16() @ self._hessian16).float()

    @cached_property
    def _hessian16(self) -> torch.Tensor:
        assert self.hessian is not None
        return self.hessian.bfloat16()


def hessian_quadratic(hessian: torch.Tensor, dampening: float, row_weight: torch.Tensor | None = None) -> Quadratic:
    """√tr(E·H·Eᵀ), the error of the layer's output for activations of Hessian H; ``dampening`` relative to H's mean diagonal."""
    mean = float(hessian.diagonal().mean())
    if not mean > 0:  # activations that are always zero carry no information
        return Quadratic(row_weight=row_weight)
    return Quadratic(hessian=hessian, row_weight=row_weight, dampening=dampening * mean)
