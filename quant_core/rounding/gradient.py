"""Gradient rounding: a soft choice between the two neighbours of each weight, hardened while it is optimized.

With low ≤ w/s ≤ high the neighbouring representable values and h ∈ [0, 1] the choice between them, E = δ·(h − h₀),
δ = s·(high − low), and h₀ is where E = 0. Minimised is

    loss(E)² + λ‖E‖² + r·Σ c·h·(1 − h),   c = δ²·(H_jj + λ),                                                      (1)

in the manner of AdaRound (arXiv 2004.10568), with a regularizer r·c·h·(1 − h) in units of each weight's own curvature c:
once r exceeds 1 the sum is concave along each weight, so that every minimum is a hard choice. r grows in cycles of
doubling length, each starting from the soft optimum E = 0; it depends on the step alone, so a longer run begins like a
shorter one. After every step the loss of the hard choice h > ½ is computed, and the best of all is kept: more steps are
never worse.
"""

import torch

from ..cancellation import CancelCheck
from ..formats import SolveSpace
from .optimizers import OPTIMIZERS, SCHEDULES, set_mode
from .quadratic import Quadratic

__all__ = ["round_gradient"]

_FIRST_CYCLE = 166  # so that 500 steps are two cycles
_LARGEST_R = 1.5  # at the end of a cycle


def _regularization(step: int) -> tuple[float, bool]:
    """r of a step, and whether it begins a cycle."""
    length = _FIRST_CYCLE
    while step >= length:
        step, length = step - length, 2 * length
    return _LARGEST_R * (step + 1) / length, step == 0


class _Choice:
    """E as a function of the parameter x, whose value clamped to [0, 1] is h."""

    def __init__(self, weight: torch.Tensor, scale: torch.Tensor, space: SolveSpace):
        self._spread = space.divisor(scale)
        scaled = weight.float() / self._spread
        self._low, self._high = space.neighbours(scaled)
        self.delta = (self._high - self._low) * self._spread
        apart = self._high > self._low
        self.start = torch.where(apart, (scaled - self._low) / (self._high - self._low), torch.full_like(scaled, 0.5))
        # Beyond the largest magnitude there is no choice, and the error does not depend on x.
        self._fixed = torch.where(apart, torch.zeros_like(scaled), self._low * self._spread - weight.float())

    def hard(self, x: torch.Tensor) -> torch.Tensor:
        return torch.where(x > 0.5, 1.0, 0.0)

    def error(self, h: torch.Tensor) -> torch.Tensor:
        return self.delta * (h - self.start) + self._fixed

    def values(self, x: torch.Tensor) -> torch.Tensor:
        return torch.where(x > 0.5, self._high, self._low)


def _value(quadratic: Quadratic, error: torch.Tensor) -> float:
    """loss(E)² + λ‖E‖²; summed per row, so that no sum depends on the number of threads."""
    return float((quadratic.gradient(error) * error).sum(dim=1).double().sum())


@torch.inference_mode(False)  # ComfyUI's nodes run in inference mode, in which optimizers do not work
@torch.no_grad()
def round_gradient(
    weight: torch.Tensor,
    scale: torch.Tensor,
    space: SolveSpace,
    quadratic: Quadratic,
    *,
    optimizer: str,
    num_iter: int,
    lr: float | None = None,
    lr_schedule: str | None = None,
    early_stop: int | None = None,
    check: CancelCheck | None = None,
) -> torch.Tensor:
    """Quantized values (out, in): the hard choice of least loss in ``num_iter`` steps, round to nearest among them.

    Args:
        weight: (out, in), any float dtype.
        scale: effective scales, float32 (*counts).
        optimizer: key of :data:`OPTIMIZERS`.
        lr, lr_schedule: None for the optimizer's own; the schedule is a key of :data:`SCHEDULES`.
        early_stop: stop after this many steps without a new best; None or 0 for never.
    """
    choice = _Choice(weight, scale, space)
    curvature = choice.delta.square()
    column_weight = quadratic.column_weight
    curvature *= 1 + quadratic.dampening if column_weight is None else column_weight
    if quadratic.row_weight is not None:
        curvature *= quadratic.row_weight[:, None]
    unit = curvature.mean().clamp_min(torch.finfo(torch.float32).tiny)
    chosen = OPTIMIZERS[optimizer]
    x = choice.start.clone()

    best, qdata = float("inf"), torch.empty(0)

    def keep_best() -> bool:
        nonlocal best, qdata
        value = _value(quadratic, choice.error(choice.hard(x)))
        if value < best:
            best, qdata = value, choice.values(x).to(space.elements.dtype)
            return True
        return False

    keep_best()
    since = 0
    for step in range(num_iter):
        if check:
            check()
        r, begins = _regularization(step)
        if begins:
            x = torch.nn.Parameter(choice.start.clone())
            solver = chosen.make([x], lr=chosen.lr if lr is None else lr)
            schedule = SCHEDULES[lr_schedule or chosen.schedule](solver)
        h = x.clamp(0, 1)
        gradient = quadratic.gradient(choice.error(h), exact=False).mul_(choice.delta)
        gradient += (0.5 * r) * curvature * (1 - 2 * h)
        gradient.masked_fill_(((x < 0) & (gradient > 0)) | ((x > 1) & (gradient < 0)), 0.0)
        x.grad = gradient.div_(unit)
        solver.step()
        set_mode(solver, "eval")
        improved = keep_best()
        set_mode(solver, "train")
        schedule.step(improved, since)
        since = 0 if improved else since + 1
        if early_stop and since >= early_stop:
            break
    return qdata
