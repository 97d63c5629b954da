"""From a weight to its codes: objective → scale → solver → never worse than nearest."""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..cancellation import CancelCheck
from ..formats import Grid, Rounded, Tiles
from .gptq import round_sequential
from .gradient import round_gradient
from .objectives import Calibrated, Identity, Objective, Principal, Quadratic
from .options import RoundingConfig
from .rtn import quantize_nearest, weight_error
from .scale_search import amax_scale, search_scale
from .slabs import error_slabs, row_slabs
from .stochastic import round_stochastic

__all__ = ["Rounder", "Candidate", "make_objectives"]

_CLOSE = 0.02  # losses nearer than this are told apart in full precision
# How often a solver may be repeated until its codes spend the weight error that the objective allows, which share of it
# is enough, and which is aimed at.
_REPETITIONS = 5
_ENOUGH, _AIM = 0.6, 0.85
# Tried where held-out inputs can choose, else the first: the fewer different inputs a Gram was made of, the more damping
# it needs. Finer steps were measured to gain less than 0.3 %.
_DAMPINGS = (0.01, 0.1, 1.0)


@dataclass(frozen=True)
class Candidate:
    """Codes (out, in), the scale they belong to (tile counts), the solver that chose them, and ‖Ŵ − W‖/‖W‖."""

    solver: str
    codes: torch.Tensor
    scale: torch.Tensor
    weight_error: float


def make_objectives(
    method: RoundingConfig,
    gram: torch.Tensor | None,
    row_weight: torch.Tensor | None = None,
    *,
    judged: bool,
    seed: int = 0,
) -> tuple[Objective, ...]:
    """What a method minimises; calibrated rounding with the inputs' ``gram`` (in, in).

    ``judged``: candidates are compared on held-out inputs. Sequential rounding then tries several dampings, unless the
    user gave one; the best of them is kept.
    """
    if method.rounding == "calibrated":
        dampings = _DAMPINGS if judged and not method.gradient else _DAMPINGS[:1]
        if method.damping is not None:
            dampings = (method.damping,)
        return tuple(Calibrated(gram, damping, row_weight) for damping in dampings)
    if method.rounding != "principal":
        return (Identity(),)
    names = ("top_p", "min_k", "max_k", "full_matrix", "weight_cost")
    return (Principal(**{name: method.get(name) for name in names}, seed=seed),)


@dataclass(frozen=True)
class Rounder:
    """One weight on its way to codes.

    Attributes:
        weight: (out, in), any float dtype, in the basis it is stored in.
        grid, tiles: where codes must lie and what shares a scale.
        objectives: what is minimised, by the scale search at least; of several, each makes candidates.
        judge: gives the quadratic form that candidates are compared by, held out from the objective where possible;
            None to compare them by the objective itself. Called when the solver is done, so that both need not fit
            into memory beside its scratch.
        parts: how many parts the rows are rounded in, for less memory.
    """

    weight: torch.Tensor
    grid: Grid
    tiles: Tiles
    method: RoundingConfig
    objectives: tuple[Objective, ...]
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
            scale, gain = self._search(amax, self.objectives[0].quadratic(self.weight))
            taken = self._nearest(scale)
        else:
            return self._learned(amax)
        judge = self.judge and self.judge()
        output_error = _relative(self._loss(judge, taken), self._total(judge)) if judge else None
        return taken, Rounded(taken.solver, taken.weight_error, gain, output_error)

    def _learned(self, amax: torch.Tensor) -> tuple[Candidate, Rounded]:
        simple = self._nearest(amax)
        candidates = [simple]
        for objective in self.objectives:
            quadratic = objective.quadratic(self.weight.float())
            scale, _ = self._search(amax, quadratic)
            bounded = quadratic.weight_bound is not None
            least = simple.weight_error * self._search(amax, Quadratic())[1] if bounded else simple.weight_error
            candidates += [self._nearest(scale), *self._within_bound(scale, quadratic, least)]
        judge = self.judge() if self.judge else quadratic
        del quadratic
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
        """What the solver makes with the damping that spends the allowed weight error; nothing where none keeps it.

        ``nearest``: the least weight error of nearest, to which the bound is relative.
        """
        if not nearest:  # already exact
            return []
        kept, tried = [], []  # candidates within the bound, each better than the one before; (log λ, log excess)
        for _ in range(_REPETITIONS):
            made = self._solved(scale, quadratic)
            if quadratic.weight_bound is None:
                return [made]
            excess = max((made.weight_error / nearest - 1) / (quadratic.weight_bound - 1), 1e-3)
            if excess <= 1 and (not kept or made.weight_error > kept[0].weight_error):
                kept = [made]
            if _ENOUGH <= excess <= 1:
                break
            tried.append((math.log(quadratic.damping), math.log(excess)))
            quadratic = dataclasses.replace(quadratic, damping=math.exp(_next_damping(tried)))
        return kept

    def _solved(self, scale: torch.Tensor, quadratic: Quadratic) -> Candidate:
        if self.method.gradient:
            options = {name: self.method.get(name) for name in ("num_iter", "lr", "lr_schedule", "early_stop")}
            solver = self.method.optimizer or "original"
            codes = self._solve(round_gradient, scale, quadratic, optimizer=solver, **options)
        else:
            solver = "sequential"
            sweeps = 0 if quadratic.rows is not None else self.method.get("sweeps")
            codes = self._solve(round_sequential, scale, quadratic, sweeps=sweeps, parts=self.parts)
        return self._measured(solver, codes, scale)

    def _solve(self, solver: Callable[..., torch.Tensor], scale: torch.Tensor, *args, **options) -> torch.Tensor:
        return solver(self.weight, scale, self.grid, self.tiles, *args, check=self.check, **options)

    def _search(self, amax: torch.Tensor, quadratic: Quadratic) -> tuple[torch.Tensor, float]:
        return search_scale(
            self.weight,
            amax,
            self.grid,
            self.tiles,
            column_weight=quadratic.column_weight,
            row_weight=quadratic.row_weight,
            seed=self.seed,
            check=self.check,
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


def _next_damping(tried: list[tuple[float, float]]) -> float:
    """Where log excess may reach its aim, from (log λ, log excess) so far: the more λ, the less excess.

    The first step takes the excess to fall as λ^−0.8, between what is seen where λ is small and where it is large; later
    ones follow the line through the two points nearest to the aim.
    """
    aim = math.log(_AIM)
    (x, y), *others = sorted(tried, key=lambda point: abs(point[1] - aim))
    slope = (others[0][1] - y) / (others[0][0] - x) if others and others[0][0] != x else -0.8
    step = (aim - y) / min(slope, -0.1)
    return x + min(max(step, -math.log(64)), math.log(64))


def _relative(part: float, whole: float, empty: float = 0.0) -> float:
    return part / whole if whole else empty
