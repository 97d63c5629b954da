"""Scaling of a weight: its scales, and the space of representable values that they belong to."""

from dataclasses import dataclass, replace

import torch

from ..cancellation import CancelCheck
from ..formats import SolveSpace
from .level_search import search_levels, start_levels
from .rtn import amax_scale
from .scale_search import search_scale

__all__ = ["Scaling", "search_scaling", "start_scaling"]


@dataclass(frozen=True)
class Scaling:
    """Scales of a weight.

    Attributes:
        scale: effective scales, float32 (*counts).
        parent: parent level of the scales, None where there is one level.
        space: representable values under them.
    """

    scale: torch.Tensor
    parent: torch.Tensor | None
    space: SolveSpace


def start_scaling(weight: torch.Tensor, space: SolveSpace, check: CancelCheck | None = None) -> Scaling:
    """The scales that round to nearest takes.

    Args:
        weight: (out, in), any float dtype, in the stored basis.
        space: whose levels, where it has some, are not yet chosen.

    Raises:
        NonFiniteWeightError: the weight contains NaN or Inf.
    """
    if space.levels:
        levels, scale = start_levels(weight, space, check)
        return Scaling(scale, None, space.with_levels(levels))
    return Scaling(*amax_scale(weight, space, check), space)


def search_scaling(
    weight: torch.Tensor,
    start: Scaling,
    *,
    column_weight: torch.Tensor | None = None,
    row_weight: torch.Tensor | None = None,
    seed: int = 0,
    check: CancelCheck | None = None,
) -> tuple[Scaling, float]:
    """The scales of least weighted error near those of :func:`start_scaling`, and the error relative to theirs.

    Args: see :func:`~.scale_search.search_scale`.
    """
    space, weights = start.space, {"column_weight": column_weight, "row_weight": row_weight}
    if space.levels:
        levels, gain = search_levels(weight, space.levels, start.scale, space, **weights, check=check)
        return replace(start, space=space.with_levels(levels)), gain
    scale, gain = search_scale(weight, start.scale, start.parent, space, **weights, seed=seed, check=check)
    return replace(start, scale=scale), gain
