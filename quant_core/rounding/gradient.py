"""Gradient rounding: a soft choice between the two neighbouring codes of each weight, hardened while it is optimized.

With low ≤ w/s ≤ high the neighbouring codes and h ∈ [0, 1] the choice between them, E = δ·(h − h₀), δ = s·(high − low),
and h₀ is where E = 0. Minimised is

    loss(E)² + λ‖E‖² + r·Σ c·h·(1 − h),   c = δ²·(H_jj + λ),                                                      (1)

in the manner of AdaRound (arXiv 2004.10568), but with a pull r·c·h·(1 − h) in units of each weight's own curvature c:
once r exceeds 1 the sum is concave along each weight, so that nothing but a hard choice is a minimum. r grows in cycles
of doubling length, each from the soft optimum E = 0 on; it depends on the step alone, so a longer run begins like a
shorter one. After every step the hard choice h > ½ is judged, and the best of all is kept: more steps are never worse.
"""

import torch

from ..cancellation import CancelCheck
from ..formats import Grid, Tiles
from .objectives import Quadratic
from .optimizers import OPTIMIZERS, SCHEDULES

__all__ = ["round_gradient"]

_FIRST_CYCLE = 166  # so that 500 steps are two cycles
_PULL = 1.5  # r at the end of a cycle


def _pull(step: int) -> tuple[float, bool]:
    """r of a step, and whether it begins a cycle."""
    length = _FIRST_CYCLE
    while step >= length:
        step, length = step - length, 2 * length
    return _PULL * (step + 1) / length, step == 0


class _Choice:
    """E as a function of the parameter x, whose clamped value is h."""

    def __init__(self, weight: torch.Tensor, scale: torch.Tensor, grid: Grid, tiles: Tiles):
        self._spread = tiles.spread(scale)
        scaled = weight.float() / self._spread
        self._low, self._high = grid.neighbours(scaled)
        self.delta = (self._high - self._low) * self._spread
        apart = self._high > self._low
        self.start = torch.where(apart, (scaled - self._low) / (self._high - self._low), torch.full_like(scaled, 0.5))
        # Beyond the grid's end there is no choice; the error there is the same whatever x says.
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


@torch.inference_mode(False)  # ComfyUI's nodes run inside inference mode, and optimizers cannot
@torch.no_grad()
def round_gradient(
    weight: torch.Tensor,
    scale: torch.Tensor,
    grid: Grid,
    tiles: Tiles,
    quadratic: Quadratic,
    *,
    optimizer: str,
    num_iter: int,
    lr: float | None = None,
    lr_schedule: str | None = None,
    early_stop: int | None = None,
    check: CancelCheck | None = None,
) -> torch.Tensor:
    """Codes (out, in) of ``grid.dtype``: the best hard choice met in ``num_iter`` steps, nearest among them.

    Args:
        weight: (out, in), any float dtype.
        scale: float32, one per tile.
        optimizer: key of :data:`OPTIMIZERS`.
        lr, lr_schedule: None for the optimizer's own; the schedule is a key of :data:`SCHEDULES`.
        early_stop: give up after so many steps without a new best; None or 0 for never.
    """
    choice = _Choice(weight, scale, grid, tiles)
    curvature = choice.delta.square()
    column_weight = quadratic.column_weight
    curvature *= 1 + quadratic.damping if column_weight is None else column_weight
    if quadratic.row_weight is not None:
        curvature *= quadratic.row_weight[:, None]
    unit = curvature.mean().clamp_min(torch.finfo(torch.float32).tiny)
    chosen = OPTIMIZERS[optimizer]
    x = choice.start.clone()

    def judge(best: float, codes: torch.Tensor | None) -> tuple[float, torch.Tensor, bool]:
        value = _value(quadratic, choice.error(choice.hard(x)))
        return (value, choice.values(x).to(grid.dtype), True) if value < best else (best, codes, False)

    best, codes, _ = judge(float("inf"), None)
    since = 0
    for step in range(num_iter):
        if check:
            check()
        pull, begins = _pull(step)
        if begins:
            x = torch.nn.Parameter(choice.start.clone())
            solver = chosen.make([x], lr=chosen.lr if lr is None else lr)
            schedule = SCHEDULES[lr_schedule or chosen.schedule](solver)
        h = x.clamp(0, 1)
        gradient = quadratic.gradient(choice.error(h), exact=False).mul_(choice.delta)
        gradient += (0.5 * pull) * curvature * (1 - 2 * h)
        gradient.masked_fill_(((x < 0) & (gradient > 0)) | ((x > 1) & (gradient < 0)), 0.0)
        x.grad = gradient.div_(unit)
        solver.step()
        averaging = hasattr(solver, "eval")  # schedule-free: judged are the averaged weights, not those that step
        if averaging:
            solver.eval()
        best, codes, improved = judge(best, codes)
        if averaging:
            solver.train()
        schedule.step(improved, since)
        since = 0 if improved else since + 1
        if early_stop and since >= early_stop:
            break
    return codes
