"""Granularities: which part of a weight shares one scale."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

__all__ = ["GRANULARITIES", "Tiles", "BLOCK_SIZE"]

BLOCK_SIZE = 128


@dataclass(frozen=True)
class Tiles:
    """A weight of shape (out, in) cut into tiles of ``rows`` × ``columns`` that share one scale each.

    Scales form a float32 grid of :attr:`counts`; the last tile of a row or column of tiles may be smaller.
    """

    out: int
    inner: int
    rows: int
    columns: int

    @property
    def counts(self) -> tuple[int, int]:
        """How many tiles: (along out, along in)."""
        return -(-self.out // self.rows), -(-self.inner // self.columns)

    @property
    def group(self) -> int:
        """Rows that can be added up before tiles are told apart: those of a small tile, else one."""
        return self.rows if self.rows < self.out else 1

    def spread(self, scale: torch.Tensor, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """The scale of each weight of rows start:stop, in a shape that broadcasts to (rows, in)."""
        if scale.shape[0] > 1:
            rows = torch.arange(start, self.out if stop is None else stop, device=scale.device)
            scale = scale[rows // self.rows]
        return scale if scale.shape[1] == 1 else scale.repeat_interleave(self.columns, dim=1)[:, : self.inner]

    def row_amax(self, rows: torch.Tensor) -> torch.Tensor:
        """Largest magnitude of each row within each tile: (n, in) → (n, tiles along in)."""
        tiles = self.counts[1]
        padded = torch.nn.functional.pad(rows, (0, tiles * self.columns - self.inner))
        return padded.view(rows.shape[0], tiles, self.columns).abs().amax(dim=2)

    def join_rows(self, values: torch.Tensor, join: Callable[..., torch.Tensor], group: int = 1) -> torch.Tensor:
        """Reduce (…, ⌈out/group⌉, tiles along in) to (…, *counts) with ``join(values, dim)``; zeros fill the last tile."""
        per_tile = -(-self.rows // group)
        missing = self.counts[0] * per_tile - values.shape[-2]
        padded = torch.nn.functional.pad(values, (0, 0, 0, missing))
        return join(padded.unflatten(-2, (self.counts[0], per_tile)), dim=-2)


# Name → the tiles of a weight (out, in), given the block size.
GRANULARITIES: Mapping[str, Callable[[int, int, int], Tiles]] = {
    "tensor": lambda out, inner, block: Tiles(out, inner, out, inner),
    "row": lambda out, inner, block: Tiles(out, inner, 1, inner),
    "block": lambda out, inner, block: Tiles(out, inner, block, block),
}
