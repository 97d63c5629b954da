"""Granularities: which part of a weight shares one scale."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

__all__ = ["Granularity", "GRANULARITIES"]


@dataclass(frozen=True)
class Granularity:
    """How one float32 scale is shared within a weight of shape (out, in).

    Attributes:
        shape: shape of the scale tensor, from (out, in).
        slab: the scales that belong to rows start:stop, broadcastable to them.
        whole: all rows share one scale.
    """

    shape: Callable[[int, int], tuple[int, ...]]
    slab: Callable[[torch.Tensor, int, int], torch.Tensor]
    whole: bool


GRANULARITIES: Mapping[str, Granularity] = {
    "tensor": Granularity(
        shape=lambda out, inner: (),
        slab=lambda scale, start, stop: scale,
        whole=True,
    ),
    "row": Granularity(
        shape=lambda out, inner: (out, 1),
        slab=lambda scale, start, stop: scale[start:stop],
        whole=False,
    ),
}
