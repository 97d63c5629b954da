"""Relative error of the outputs of a block or model over several calls."""

import math
from collections.abc import Sequence

import torch

__all__ = ["ErrorSum"]


class ErrorSum:
    """√ of the mean, over outputs, of Σ‖ŷ − y‖²/Σ‖y‖², the sums being over calls."""

    def __init__(self):
        self._sums: dict[int, tuple[float, float]] = {}

    def add(self, found: Sequence[torch.Tensor], exact: Sequence[torch.Tensor], weight: float) -> None:
        """Add the outputs of one call, with its weight in the sums."""
        for position, (a, b) in enumerate(zip(found, exact, strict=True)):
            if b.is_floating_point():
                error, total = self._sums.get(position, (0.0, 0.0))
                square = torch.linalg.vector_norm(a.float() - b.float(), dtype=torch.float64).square()
                energy = torch.linalg.vector_norm(b.float(), dtype=torch.float64).square()
                self._sums[position] = error + weight * float(square), total + weight * float(energy)

    @property
    def value(self) -> float:
        """The error of all outputs that were added; NaN where some contain NaN or Inf."""
        shares = [error / total for error, total in self._sums.values() if total != 0]
        return math.sqrt(sum(shares) / len(shares)) if shares else 0.0
