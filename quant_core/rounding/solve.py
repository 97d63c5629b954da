"""From a weight to its quantized values: scale → solver → never worse than round to nearest."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch

from ..cancellation import CancelCheck
from ..formats import INT8, Solution, SolveSpace
from .gptq import Factorization, default_beam_width, factorize, round_gptq
from .gradient import round_gradient
from .memo import MatrixMemo, recall
from .options import RoundingConfig
from .principal import Principal, solve_within_bound
from .projected import round_projected
from .quadratic import Quadratic, hessian_quadratic
from .rtn import round_to_nearest, weight_error
from .scaling import Scaling, search_scaling, start_scaling
from .slabs import error_slabs, row_slabs
from .stochastic import round_stochastic

__all__ = ["WeightSolver"]

_CLOSE = 0.02  # losses within this ratio of the smallest are computed again in full precision
# Tried where validation statistics can choose, else the first: the fewer different activations a Hessian was made of, the
# more dampening it needs. Finer steps gain less than 0.3 % (measured).
_DAMPENINGS = (0.01, 0.1, 1.0)
_BOTH_SCALES = (INT8,)  # elements for which the start's scale of a row is tried as well
_SAMPLED_ROWS = 256  # on which the dampening of a weight of more than twice as many rows is chosen


@dataclass(frozen=True)
class WeightSolver:
    """Round one weight.

    Attributes:
        weight: (out, in), any float dtype, in the stored basis.
        space: representable values and scales.
        rounding: the resolved rounding and its options.
        hessian: H of the activations, float32 (in, in), on the weight's device; None without a calibration.
        validation: returns the error of the output for other activations, by which solutions are compared, or None;
            without ``row_weight``. Called when a solver is done, so that its scratch need not fit into memory as well.
        validated: :attr:`validation` will return one.
        row_weight: float32 (out,), weight of each output channel in the loss; None for ones.
        parts: the rows are rounded in this many parts, for less memory.
        memo: factorizations that other formats of the layer have computed.
    """

    weight: torch.Tensor
    space: SolveSpace
    rounding: RoundingConfig
    hessian: torch.Tensor | None = None
    validation: Callable[[], Quadratic | None] = lambda: None
    validated: bool = False
    row_weight: torch.Tensor | None = None
    parts: int = 1
    memo: MatrixMemo | None = None
    seed: int = 0
    check: CancelCheck | None = None

    def solve(self) -> Solution:
        """The best solution, with its errors.

        Raises:
            NonFiniteWeightError: the weight contains NaN or Inf.
            CalibrationError: the Hessian is not positive semi-definite.
        """
        start = start_scaling(self.weight, self.space, self.check)
        if self.rounding.rounding == "nearest":
            return self._with_output_error(self._round_nearest(start))
        if self.rounding.rounding == "stochastic":
            qdata = round_stochastic(self.weight, start.scale, start.space, seed=self.seed, check=self.check)
            return self._with_output_error(self._solution("stochastic", qdata, start))
        if self.rounding.rounding == "auto":
            scaling, gain = self._search_scale(start, Quadratic())
            return self._with_output_error(replace(self._round_nearest(scaling), gain=gain))
        objectives = self._objectives(start)
        nearest = self._round_nearest(start)
        candidates = [solution for objective in objectives for solution in self._candidates(*objective, start, nearest)]
        return self._choose_best([nearest, *candidates], objectives[-1][0])

    def _objectives(self, start: Scaling) -> list[tuple[Quadratic, Factorization | None]]:
        """What is minimised, with its factorization where it is known; one dampening for weights of many rows."""
        quadratics = self._quadratics()
        if len(quadratics) == 1 or self.weight.shape[0] <= 2 * _SAMPLED_ROWS:
            return [(quadratic, None) for quadratic in quadratics]
        return [self._choose_dampening(quadratics, start)]

    def _choose_dampening(self, quadratics: list[Quadratic], start: Scaling) -> tuple[Quadratic, Factorization | None]:
        """The dampening of least loss on some rows, which are rounded as the whole weight will be, by GPTQ."""
        sample, of_sample = self._sample_rows()
        best, factorization, least = quadratics[0], None, float("inf")
        compared = sample._output_error()
        assert compared is not None
        for quadratic in quadratics:  # by ascending dampening
            tried = self._factorize(quadratic, like=factorization)
            scalings = of_sample(self._search_scale(start, quadratic)[0]), of_sample(start)
            loss = sample._loss(compared, sample._round_under(*scalings, quadratic, tried), exact=True)
            if factorization is not None and loss >= least:
                break  # the loss has one minimum over the dampening
            best, factorization, least = quadratic, tried, loss
        return best, factorization

    def _sample_rows(self) -> tuple["WeightSolver", Callable[[Scaling], Scaling]]:
        """The solver of some rows, drawn as whole scale groups, and what takes their scales out of all."""
        groups = self.space.groups
        several = groups.counts[0] > 1
        height = groups.rows if several else 1
        generator = torch.Generator().manual_seed(self.seed)
        drawn = torch.randperm(groups.out // height, generator=generator)[: max(1, _SAMPLED_ROWS // height)]
        chosen = drawn.sort().values.to(self.weight.device)
        rows = (chosen[:, None] * height + torch.arange(height, device=chosen.device)).flatten()
        sampled = replace(groups, out=len(rows), rows=height if several else len(rows))

        def of_sample(scaling: Scaling) -> Scaling:
            space = replace(scaling.space.of_rows(rows), groups=sampled)
            return replace(scaling, scale=scaling.scale[chosen] if several else scaling.scale, space=space)

        solver = replace(
            self,
            weight=self.weight[rows],
            space=replace(self.space, groups=sampled),
            row_weight=None if self.row_weight is None else self.row_weight[rows],
            parts=1,
        )
        return solver, of_sample

    def _factorize(self, quadratic: Quadratic, like: Factorization | None) -> Factorization:
        passes = self.rounding.get("sweeps")

        def make() -> Factorization:
            return factorize(quadratic, self.weight.shape[1], self.weight.device, passes=passes, like=like)

        like_dampening = None if like is None else like.dampening  # whose order of columns is used
        return recall(self.memo, quadratic.hessian, (quadratic.dampening, passes, like_dampening), make)

    def _candidates(
        self, quadratic: Quadratic, factorization: Factorization | None, start: Scaling, nearest: Solution
    ) -> Iterator[Solution]:
        """Round to nearest under the scale searched for an objective, and what the solver makes of it."""
        scaling, _ = self._search_scale(start, quadratic)
        yield self._round_nearest(scaling)
        if quadratic.weight_bound is not None:
            least = nearest.weight_error * self._search_scale(start, Quadratic())[1]
            yield from solve_within_bound(lambda form: self._run_solver(scaling, form), quadratic, least)
        elif nearest.weight_error:
            yield replace(
                self._round_under(scaling, start, quadratic, factorization), dampening=quadratic.relative_dampening
            )

    def _round_under(
        self, searched: Scaling, start: Scaling, quadratic: Quadratic, factorization: Factorization | None
    ) -> Solution:
        """What the solver makes of the searched scales; for INT8 per row, in each row the better of that and of the start's.

        The search minimises the error of round to nearest, which raises the squared loss of GPTQ by 2 % (measured).
        """
        groups, levels = searched.space.groups, searched.space.levels
        per_row = groups.counts == (groups.out, 1) and levels is None
        if self.rounding.gradient or not per_row or searched.space.elements not in _BOTH_SCALES:
            return self._run_solver(searched, quadratic, factorization)
        factorization = factorization or self._factorize(quadratic, like=None)
        solution, other = (self._run_solver(scaling, quadratic, factorization) for scaling in (searched, start))
        form = replace(quadratic, row_weight=None)
        better = self._row_losses(form, other) < self._row_losses(form, solution)
        qdata = torch.where(better[:, None], other.qdata, solution.qdata)
        scale = torch.where(better[:, None], start.scale, searched.scale)
        return self._solution(solution.solver, qdata, replace(searched, scale=scale))

    def _row_losses(self, quadratic: Quadratic, solution: Solution) -> torch.Tensor:
        """What the solver minimises, of each row, float32 (out,)."""
        slabs = error_slabs(self.weight, solution.qdata, solution.scale, self.space, self.check)
        losses = [quadratic.gradient(error, exact=False).mul_(error).sum(dim=1) for _, _, error in slabs]
        return torch.cat(losses)

    def _quadratics(self) -> list[Quadratic]:
        """What the rounding minimises; several dampenings where validation statistics can choose and the user did not."""
        if self.rounding.rounding == "principal":
            names = ("top_p", "min_k", "max_k", "full_matrix", "weight_cost")
            options = {name: self.rounding.get(name) for name in names}
            return [Principal(**options, seed=self.seed).quadratic(self.weight.float())]
        assert self.hessian is not None
        dampenings = _DAMPENINGS if self.validated and not self.rounding.gradient else _DAMPENINGS[:1]
        if self.rounding.damping is not None:
            dampenings = (self.rounding.damping,)
        return [hessian_quadratic(self.hessian, dampening, self.row_weight) for dampening in dampenings]

    def _run_solver(
        self, scaling: Scaling, quadratic: Quadratic, factorization: Factorization | None = None
    ) -> Solution:
        scale, space = scaling.scale, scaling.space
        if self.rounding.gradient:
            solver = self.rounding.optimizer or "original"
            qdata = round_gradient(
                self.weight,
                scale,
                space,
                quadratic,
                optimizer=solver,
                num_iter=self.rounding.get("num_iter"),
                lr=self.rounding.lr,
                lr_schedule=self.rounding.lr_schedule,
                early_stop=self.rounding.early_stop,
                check=self.check,
            )
        elif quadratic.rows is not None:
            solver = "gptq"
            qdata = round_projected(self.weight, scale, space, quadratic, check=self.check)
        else:
            solver = "gptq"
            qdata = round_gptq(
                self.weight,
                scale,
                space,
                quadratic,
                passes=self.rounding.get("sweeps"),
                beam_width=self.rounding.beam_width or default_beam_width(space, self.weight.device),
                parts=self.parts,
                factorization=factorization or self._factorize(quadratic, like=None),
                check=self.check,
            )
        return self._solution(solver, qdata, scaling)

    def _choose_best(self, solutions: list[Solution], objective: Quadratic) -> Solution:
        """The solution of least loss by the validation Hessian, else by the objective; the first is round to nearest."""
        output_error = self._output_error()
        compared = output_error or objective
        losses = [self._loss(compared, solution) for solution in solutions]
        close = [index for index, loss in enumerate(losses) if loss <= min(losses) * (1 + _CLOSE)]
        if len(close) > 1 and compared.hessian is not None:
            for index in {0, *close}:
                losses[index] = self._loss(compared, solutions[index], exact=True)
        least = min(losses)
        best = solutions[losses.index(least)]
        relative = _relative(least, self._total(compared)) if output_error else None
        return replace(best, gain=_relative(least, losses[0], 1.0), output_error=relative)

    def _output_error(self) -> Quadratic | None:
        """The error of the layer's output, on the validation Hessian where there is one; None without a calibration."""
        validation = self.validation() if self.validated else None
        if validation is not None:
            return replace(validation, row_weight=self.row_weight)
        return None if self.hessian is None else Quadratic(hessian=self.hessian, row_weight=self.row_weight)

    def _with_output_error(self, solution: Solution) -> Solution:
        quadratic = self._output_error()
        if quadratic is None:
            return solution
        relative = _relative(self._loss(quadratic, solution), self._total(quadratic))
        return replace(solution, output_error=relative)

    def _search_scale(self, start: Scaling, quadratic: Quadratic) -> tuple[Scaling, float]:
        return search_scaling(
            self.weight,
            start,
            column_weight=quadratic.column_weight,
            row_weight=quadratic.row_weight,
            seed=self.seed,
            check=self.check,
        )

    def _round_nearest(self, scaling: Scaling) -> Solution:
        qdata, error = round_to_nearest(self.weight, scaling.scale, scaling.space, self.check)
        return Solution("nearest", qdata, scaling.scale, scaling.parent, error, levels=scaling.space.levels)

    def _solution(self, solver: str, qdata: torch.Tensor, scaling: Scaling) -> Solution:
        error = weight_error(self.weight, qdata, scaling.scale, self.space, self.check)
        return Solution(solver, qdata, scaling.scale, scaling.parent, error, levels=scaling.space.levels)

    def _loss(self, quadratic: Quadratic, solution: Solution, *, exact: bool = False) -> float:
        errors = error_slabs(self.weight, solution.qdata, solution.scale, self.space, self.check)
        return quadratic.loss(errors, exact=exact)

    def _total(self, quadratic: Quadratic) -> float:
        return quadratic.loss(row_slabs(self.weight, self.check), exact=False)


def _relative(part: float, whole: float, empty: float = 0.0) -> float:
    return part / whole if whole else empty
