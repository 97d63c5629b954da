"""From a weight to its codes: objective → scale → solver → never worse than nearest."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..events import CancelCheck
from ..formats import Grid, Rounded, Tiles
from .gradient import round_gradient
from .methods import Method
from .nearest import quantize_nearest, weight_error
from .objectives import Calibrated, Objective, Principal, Quadratic
from .scales import amax_scale, search_scale
from .sequential import round_sequential
from .slabs import error_slabs, row_slabs
from .stochastic import round_stochastic

__all__ = ["Rounder", "Candidate", "make_objective"]

_CLOSE = 0.02  # losses nearer than this are told apart in full precision
_REPETITIONS = 6  # of a solver whose codes cost more weight error than the objective allows


@dataclass(frozen=True)
class Candidate:
    """Codes (out, in), the scale they belong to (tile counts), the solver that chose them, and ‖Ŵ − W‖/‖W‖."""

    solver: str
    codes: torch.Tensor
    scale: torch.Tensor
    weight_error: float


def make_objective(
    method: Method, gram: torch.Tensor | None, row_weight: torch.Tensor | None = None, seed: int = 0
) -> Objective:
    """What a method minimises: principal or calibrated, the latter with the inputs' ``gram`` (in, in)."""
    if method.rounding == "calibrated":
        return Calibrated(gram, method.get("damping"), row_weight)
    names = ("top_p", "min_k", "max_k", "full_matrix", "weight_cost")
    return Principal(**{name: method.get(name) for name in names}, seed=seed)


@dataclass(frozen=True)
class Rounder:
    """One weight on its way to codes.

    Attributes:
        weight: (out, in), any float dtype, in the basis it is stored in.
        grid, tiles: where codes must lie and what shares a scale.
        objective: what is minimised by a learned method; None for the others.
        judge: gives the quadratic form that candidates are compared by, held out from the objective where possible;
            None to compare them by the objective itself. Called when the solver is done, so that both need not fit
            into memory beside its scratch.
        parts: how many parts the rows are rounded in, for less memory.
    """

    weight: torch.Tensor
    grid: Grid
    tiles: Tiles
    method: Method
    objective: Objective | None = None
    judge: Callable[[], Quadratic] | None = None
    parts: int = 1
    seed: int = 0
    check: CancelCheck | None = None

    def round(self) -> tuple[Candidate, Rounded]:
        """The best candidate, and what it costs."""
        amax = amax_scale(self.weight, self.grid, self.tiles, self.check)
        gain = None
        if self.method.rounding == "nearest":
            taken = self._nearest(amax)
        elif self.method.rounding == "stochastic":
            taken = self._measured("stochastic", self._solve(round_stochastic, amax, seed=self.seed), amax)
        elif self.method.rounding == "auto":
            scale, gain = self._search(amax)
            taken = self._nearest(scale)
        else:
            return self._learned(amax)
        judge = self.judge and self.judge()
        output_error = _relative(self._loss(judge, taken), self._total(judge)) if judge else None
        return taken, Rounded(taken.solver, taken.weight_error, gain, output_error)

    def _learned(self, amax: torch.Tensor) -> tuple[Candidate, Rounded]:
        quadratic = self.objective.quadratic(self.weight.float())
        scale, _ = self._search(amax, column_weight=quadratic.column_weight, row_weight=quadratic.row_weight)
        simple, searched = self._nearest(amax), self._nearest(scale)
        bounded = quadratic.weight_bound is not None
        least = simple.weight_error * self._search(amax)[1] if bounded else simple.weight_error
        learned = self._within_bound(scale, quadratic, least)
        judge = self.judge() if self.judge else quadratic
        del quadratic
        candidates = [simple, searched, *learned]
        losses = [self._loss(judge, one) for one in candidates]
        close = [index for index, loss in enumerate(losses) if loss <= min(losses) * (1 + _CLOSE)]
        if len(close) > 1:
            for index in {0, *close}:
                losses[index] = self._loss(judge, candidates[index], exact=True)
        lost = min(losses)
        taken = candidates[losses.index(lost)]
        output_error = _relative(lost, self._total(judge)) if self.judge else None
        return taken, Rounded(taken.solver, taken.weight_error, _relative(lost, losses[0], 1.0), output_error)

    def _within_bound(self, scale: torch.Tensor, quadratic: Quadratic, nearest: float) -> list[Candidate]:
        """What the solver makes, damped more until its weight error is within bounds; nothing where it never is.

        ``nearest``: the least weight error of nearest, to which the bound is relative.
        """
        for _ in range(_REPETITIONS):
            if self.method.gradient:
                options = {name: self.method.get(name) for name in ("num_iter", "lr", "lr_schedule", "early_stop")}
                solver = self.method.optimizer or "original"
                codes = self._solve(round_gradient, scale, quadratic, optimizer=solver, **options)
            else:
                solver = "sequential"
                sweeps = self.method.get("sweeps")
                codes = self._solve(round_sequential, scale, quadratic, sweeps=sweeps, parts=self.parts)
            made = self._measured(solver, codes, scale)
            if quadratic.weight_bound is None or made.weight_error <= quadratic.weight_bound * nearest:
                return [made]
            # Measured: what codes cost beyond nearest falls about as the fourth root of the damping.
            excess = (made.weight_error / nearest - 1) / (quadratic.weight_bound - 1)
            damping = quadratic.damping * min(max(excess**4, 1.3), 64.0)
            quadratic = dataclasses.replace(quadratic, damping=damping)
        return []

    def _solve(self, solver: Callable[..., torch.Tensor], scale: torch.Tensor, *args, **options) -> torch.Tensor:
        return solver(self.weight, scale, self.grid, self.tiles, *args, check=self.check, **options)

    def _search(self, amax: torch.Tensor, **weights) -> tuple[torch.Tensor, float]:
        return search_scale(
            self.weight, amax, self.grid, self.tiles, **weights, seed=self.seed, check=self.check
        )

    def _nearest(self, scale: torch.Tensor) -> Candidate:
        codes, error = quantize_nearest(self.weight, scale, self.grid, self.tiles, self.check)
        return Candidate("nearest", codes, scale, error)

    def _measured(self, solver: str, codes: torch.Tensor, scale: torch.Tensor) -> Candidate:
        return Candidate(solver, codes, scale, weight_error(self.weight, codes, scale, self.tiles, self.check))

    def _loss(self, quadratic: Quadratic, candidate: Candidate, *, exact: bool = False) -> float:
        errors = error_slabs(self.weight, candidate.codes, candidate.scale, self.tiles, self.check)
        return quadratic.loss(errors, exact=exact)

    def _total(self, quadratic: Quadratic) -> float:
        return quadratic.loss(row_slabs(self.weight, self.check), exact=False)


def _relative(part: float, whole: float, empty: float = 0.0) -> float:
    return part / whole if whole else empty
