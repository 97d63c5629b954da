"""Packed bytes and tiled scales, element by element."""

import pytest
import torch

from learned_rounding.quant_core.formats.packing import (
    pack_nibbles,
    pad_matrix,
    tile_scales,
    tiled_shape,
    unpack_nibbles,
    untile_scales,
)


@pytest.mark.parametrize("high_first, byte", [(True, 0x1E), (False, 0xE1)])
def test_the_even_column_is_in_the_named_half(high_first, byte):
    assert pack_nibbles(torch.tensor([[1, 14]], dtype=torch.uint8), high_first=high_first).tolist() == [[byte]]


@pytest.mark.parametrize("high_first", [True, False])
def test_unpack_inverts_pack(high_first):
    values = torch.randint(0, 16, (5, 12), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    assert torch.equal(unpack_nibbles(pack_nibbles(values, high_first=high_first), high_first=high_first), values)


def test_padding_appends_zeros():
    matrix = torch.ones(3, 5).to(torch.float8_e4m3fn)
    padded = pad_matrix(matrix, 4).float()
    assert padded.shape == (4, 8)
    assert torch.equal(padded[:3, :5], matrix.float()) and padded.sum() == 15


@pytest.mark.parametrize("rows, columns", [(1, 1), (33, 3), (128, 4), (130, 9)])
def test_tiles_have_the_layout_of_cublas(rows, columns):
    """Row r, column c is at byte (r mod 32)·16 + (r div 32 mod 4)·4 + (c mod 4) of tile (r div 128, c div 4)."""
    scales = torch.randint(1, 255, (rows, columns), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    high, wide = tiled_shape(rows, columns)
    flat = tile_scales(scales).flatten()
    assert flat.numel() == high * wide
    for r in range(rows):
        for c in range(columns):
            tile = (r // 128) * (wide // 4) + c // 4
            assert flat[tile * 512 + (r % 32) * 16 + (r // 32 % 4) * 4 + c % 4] == scales[r, c]
    assert int((flat > 0).sum()) == rows * columns


@pytest.mark.parametrize("rows, columns", [(1, 1), (33, 3), (128, 4), (130, 9)])
def test_untile_inverts_tile(rows, columns):
    scales = torch.randint(0, 255, (rows, columns), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    assert torch.equal(untile_scales(tile_scales(scales), rows, columns), scales)
