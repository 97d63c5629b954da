"""Bytes of a file: two 4-bit values in one, padded matrices, scales in the tiles of cuBLAS."""

import torch

__all__ = ["pack_nibbles", "pad_matrix", "round_up", "tile_scales", "tiled_shape", "unpack_nibbles", "untile_scales"]

_TILE_ROWS, _TILE_COLUMNS = 128, 4


def round_up(count: int, multiple: int) -> int:
    """The smallest multiple that is not less than ``count``."""
    return -(-count // multiple) * multiple


def pad_matrix(matrix: torch.Tensor, multiple: int) -> torch.Tensor:
    """A matrix of a one-byte dtype with zero rows and columns up to a multiple of ``multiple``, contiguous."""
    rows, columns = matrix.shape
    padding = (0, round_up(columns, multiple) - columns, 0, round_up(rows, multiple) - rows)
    return torch.nn.functional.pad(matrix.view(torch.uint8), padding).contiguous().view(matrix.dtype)


def pack_nibbles(values: torch.Tensor, *, high_first: bool) -> torch.Tensor:
    """uint8 (rows, n), values 0…15 → uint8 (rows, n/2); ``high_first``: the even column in the high four bits."""
    even, odd = values[:, ::2], values[:, 1::2]
    high, low = (even, odd) if high_first else (odd, even)
    return (high << 4) | low


def unpack_nibbles(packed: torch.Tensor, *, high_first: bool) -> torch.Tensor:
    """Inverse of :func:`pack_nibbles`, of any one-byte dtype, as uint8."""
    values = packed.view(torch.uint8)
    halves = (values >> 4, values & 15) if high_first else (values & 15, values >> 4)
    return torch.stack(halves, dim=-1).flatten(-2)


def tiled_shape(rows: int, columns: int) -> tuple[int, int]:
    """Shape of the tensor that holds ``rows`` × ``columns`` scales in tiles."""
    return round_up(rows, _TILE_ROWS), round_up(columns, _TILE_COLUMNS)


def tile_scales(scales: torch.Tensor) -> torch.Tensor:
    """Scales (rows, columns) of a one-byte dtype in cuBLAS's layout for block-scaled products, zeros where there are none.

    Tiles of 128 × 4 follow each other; in a tile, row r is at (r mod 32, r div 32). Source: cuBLAS documentation,
    "1D Block Scaling Factors Layout".
    """
    rows, columns = tiled_shape(*scales.shape)
    padded = torch.nn.functional.pad(
        scales.view(torch.uint8), (0, columns - scales.shape[1], 0, rows - scales.shape[0])
    )
    tiles = padded.view(rows // _TILE_ROWS, 4, _TILE_ROWS // 4, columns // _TILE_COLUMNS, _TILE_COLUMNS)
    return tiles.permute(0, 3, 2, 1, 4).reshape(rows, columns).view(scales.dtype)


def untile_scales(tiled: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """Inverse of :func:`tile_scales` as uint8 (rows, columns); ``tiled``: any shape, a one-byte dtype."""
    high, wide = -(-rows // _TILE_ROWS), -(-columns // _TILE_COLUMNS)
    tiles = tiled.view(torch.uint8).reshape(high, wide, _TILE_ROWS // 4, 4, _TILE_COLUMNS)
    return tiles.permute(0, 3, 2, 1, 4).reshape(high * _TILE_ROWS, wide * _TILE_COLUMNS)[:rows, :columns].contiguous()
