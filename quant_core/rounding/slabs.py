"""Work in slabs of whole rows, so that float32 scratch stays small beside the weight."""

from collections.abc import Iterator

import torch

from ..events import CancelCheck

__all__ = ["row_slabs"]

# Elements of one slab: 1 MiB of float32 stays in a CPU's cache; a GPU wants larger launches and has the room.
_SLAB = {"cpu": 1 << 18}
_SLAB_ACCELERATOR = 1 << 26


def row_slabs(weight: torch.Tensor, check: CancelCheck | None = None) -> Iterator[tuple[int, int, torch.Tensor]]:
    """Yield (start, stop, rows start:stop as float32) over ``weight`` (out, in); ``check`` may raise to cancel."""
    limit = _SLAB.get(weight.device.type, _SLAB_ACCELERATOR)
    step = max(1, limit // max(1, weight.shape[1]))
    for start in range(0, weight.shape[0], step):
        if check:
            check()
        rows = weight[start : start + step]
        yield start, start + rows.shape[0], rows.float()
