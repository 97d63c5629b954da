"""Packed bytes and tiled scales, element by element."""

import torch

from learned_rounding.quant_core.formats.packing import (
    pack_nibbles,
    pad_matrix,
    round_up,
    tile_scales,
    tiled_shape,
    unpack_nibbles,
    untile_scales,
)

SHAPES = ((1, 1), (33, 3), (128, 4), (130, 9))


def test_the_even_column_is_in_the_named_half():
    pair = torch.tensor([[1, 14]], dtype=torch.uint8)
    assert pack_nibbles(pair, high_first=True).tolist() == [[0x1E]]
    assert pack_nibbles(pair, high_first=False).tolist() == [[0xE1]]


def test_unpack_inverts_pack(subtests):
    values = torch.randint(0, 16, (5, 12), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    for high_first in (True, False):
        with subtests.test(high_first=high_first):
            packed = pack_nibbles(values, high_first=high_first)
            assert torch.equal(unpack_nibbles(packed, high_first=high_first), values)


def test_padding_appends_zeros():
    matrix = torch.ones(3, 5).to(torch.float8_e4m3fn)
    padded = pad_matrix(matrix, 4).float()
    assert padded.shape == (4, 8)
    assert torch.equal(padded[:3, :5], matrix.float())
    assert padded.sum() == 15


def test_sides_are_rounded_up_to_multiples():
    assert [round_up(side, 16) for side in (1, 16, 17, 32)] == [16, 16, 32, 32]


def random_scales(rows: int, columns: int) -> torch.Tensor:
    return torch.randint(1, 255, (rows, columns), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def test_tiles_have_the_layout_of_cublas(subtests):
    """Row r, column c is at byte (r mod 32)·16 + (r div 32 mod 4)·4 + (c mod 4) of tile (r div 128, c div 4)."""
    for rows, columns in SHAPES:
        scales = random_scales(rows, columns)
        high, wide = tiled_shape(rows, columns)
        flat = tile_scales(scales).flatten()
        expected = torch.zeros(high * wide, dtype=torch.uint8)
        for r in range(rows):
            for c in range(columns):
                tile = (r // 128) * (wide // 4) + c // 4
                expected[tile * 512 + (r % 32) * 16 + (r // 32 % 4) * 4 + c % 4] = scales[r, c]
        with subtests.test(rows=rows, columns=columns):
            assert torch.equal(flat, expected)


def test_untile_inverts_tile(subtests):
    for rows, columns in SHAPES:
        scales = random_scales(rows, columns)
        with subtests.test(rows=rows, columns=columns):
            assert torch.equal(untile_scales(tile_scales(scales), rows, columns), scales)
