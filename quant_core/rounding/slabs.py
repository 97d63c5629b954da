"""Work on slabs of whole rows, so that float32 scratch stays small compared with the weight."""

from collections.abc import Iterator

import torch

from ..cancellation import CancelCheck
from ..formats import SolveSpace

__all__ = ["error_slabs", "row_slabs"]

# Elements of one slab: 1 MiB of float32 stays in a CPU's cache; a GPU needs larger launches, of 16 MiB.
_SLAB = {"cpu": 1 << 18}
_SLAB_ACCELERATOR = 1 << 22


def row_slabs(
    weight: torch.Tensor, check: CancelCheck | None = None, multiple: int = 1
) -> Iterator[tuple[int, int, torch.Tensor]]:
    """Yield (start, stop, rows start:stop as float32) over ``weight`` (out, in); ``check`` may raise to cancel.

    ``multiple``: every slab but the last has a multiple of this number of rows.
    """
    limit = _SLAB.get(weight.device.type, _SLAB_ACCELERATOR)
    step = max(1, limit // max(1, weight.shape[1]) // multiple) * multiple
    for start in range(0, weight.shape[0], step):
        if check:
            check()
        rows = weight[start : start + step]
        yield start, start + rows.shape[0], rows.float()


def error_slabs(
    weight: torch.Tensor, qdata: torch.Tensor, scale: torch.Tensor, space: SolveSpace, check: CancelCheck | None = None
) -> Iterator[tuple[int, int, torch.Tensor]]:
    """Yield (start, stop, rows start:stop of E = Ŵ − W) as float32; ``scale``: float32 (*counts)."""
    for start, stop, rows in row_slabs(weight, check):
        yield start, stop, space.decode(qdata[start:stop], scale, start, stop).sub_(rows)
