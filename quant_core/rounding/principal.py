"""Principal rounding: the least error in the weight's own leading singular directions. It needs no activations."""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..formats import Solution
from .quadratic import Quadratic
from .svd import leading_singular_vectors

__all__ = ["Principal", "principal_rank", "solve_within_bound"]

_MARGIN = 0.9  # share of the allowed weight error that is aimed at, so that a solution seldom has to be repeated
# How often a solver is repeated at most until it spends the allowed weight error; which share is enough; which is aimed at.
_REPETITIONS = 5
_ENOUGH, _AIM = 0.6, 0.85


def principal_rank(shape: tuple[int, int], top_p: float, min_k: int, max_k: int) -> int:
    """k = min(max_k, max(min_k, ⌊top_p·min(out, in)⌋)), at least 1 and at most min(out, in)."""
    side = min(shape)
    return max(1, min(side, max_k, max(min_k, int(top_p * side))))


@dataclass(frozen=True)
class Principal:
    """‖Uᵀ·E·V‖, U and V the leading singular vectors of the weight.

    The error that is kept out of that subspace of k² dimensions goes into the others: the smaller the loss, the larger
    the plain weight error. GPTQ shapes the error so: within the rows' subspace it is divided by 1+λ in the columns'
    subspace and by λ elsewhere, at a constant product, hence

        (‖E‖/‖E RTN‖)² ≈ 1 − k/out + k/out·(p·r^(1−p) + (1−p)·r^(−p)),  r = λ/(1+λ),  p = k/in.

    λ is the smallest that keeps this within ``weight_cost``.

    Attributes:
        top_p, min_k, max_k: see :func:`principal_rank`.
        full_matrix: take U and V from the complete SVD.
        weight_cost: how much larger than that of RTN ‖E‖ may become: 0.03 allows 3 %.
        seed: of the truncated SVD.
    """

    top_p: float = 0.2
    min_k: int = 1
    max_k: int = 1280
    full_matrix: bool = False
    weight_cost: float = 0.03
    seed: int = 0

    def quadratic(self, weight: torch.Tensor) -> Quadratic:
        """The quadratic form for a weight, float32 (out, in), on its device."""
        k = principal_rank((weight.shape[0], weight.shape[1]), self.top_p, self.min_k, self.max_k)
        u, v = leading_singular_vectors(weight, k, seed=self.seed, full=self.full_matrix)
        dampening = self._dampening(k / weight.shape[0], k / weight.shape[1])
        return Quadratic(factor=v, rows=u, dampening=dampening, weight_bound=1 + self.weight_cost)

    def _dampening(self, rows: float, columns: float) -> float:
        allowed = (1 + _MARGIN * self.weight_cost) ** 2

        def cost(r: float) -> float:
            return 1 - rows + rows * (columns * r ** (1 - columns) + (1 - columns) * r**-columns)

        low, high = -20.0, 0.0  # log2 of r; the cost falls as r grows
        for _ in range(50):
            middle = (low + high) / 2
            low, high = (middle, high) if cost(2**middle) > allowed else (low, middle)
        r = min(2**high, 1 - 2**-20)
        return r / (1 - r)


def solve_within_bound(
    solve: Callable[[Quadratic], Solution], quadratic: Quadratic, least_error: float
) -> list[Solution]:
    """The solution with the dampening that spends the allowed weight error; empty where none stays within it.

    Args:
        solve: a solver.
        quadratic: has a ``weight_bound``, relative to ``least_error``.
        least_error: the smallest weight error of RTN; 0 where it is exact, and nothing can be gained.
    """
    bound = quadratic.weight_bound
    if not least_error or bound is None:
        return []
    within, tried = [], []  # the best solution within the bound; (log λ, log excess)
    for _ in range(_REPETITIONS):
        solution = solve(quadratic)
        excess = max((solution.weight_error / least_error - 1) / (bound - 1), 1e-3)
        if excess <= 1 and (not within or solution.weight_error > within[0].weight_error):
            within = [solution]
        if _ENOUGH <= excess <= 1:
            break
        tried.append((math.log(quadratic.dampening), math.log(excess)))
        quadratic = dataclasses.replace(quadratic, dampening=math.exp(_next_log_dampening(tried)))
    return within


def _next_log_dampening(tried: list[tuple[float, float]]) -> float:
    """log λ at which log excess may reach its aim, from the pairs so far: more λ, less excess.

    The first step assumes that the excess falls as λ^−0.8, between what is measured for small and for large λ; later ones
    follow the line through the two points nearest to the aim.
    """
    aim = math.log(_AIM)
    (x, y), *others = sorted(tried, key=lambda point: abs(point[1] - aim))
    slope = (others[0][1] - y) / (others[0][0] - x) if others and others[0][0] != x else -0.8
    step = (aim - y) / min(slope, -0.1)
    return x + min(max(step, -math.log(64)), math.log(64))
