"""Packed symmetric matrices: panels of columns of the lower triangle."""

import pytest
import torch

from learned_rounding.quant_core.calibration import panels
from learned_rounding.quant_core.calibration.panels import iter_panels, pack_symmetric, packed_size, unpack_symmetric


def symmetric(size: int) -> torch.Tensor:
    matrix = torch.randn(size, size, generator=torch.Generator().manual_seed(size))
    return matrix + matrix.t()


@pytest.fixture
def width(monkeypatch):
    """Panels of four columns; the defaults of functions are set when they are defined."""
    monkeypatch.setattr(panels.iter_panels, "__defaults__", (4,))
    monkeypatch.setattr(panels.packed_size, "__defaults__", (4,))


def test_unpacked_matrix_is_the_packed_one(width, subtests):
    for size in [1, 3, 4, 5, 8, 11]:
        with subtests.test(size=size):
            matrix = symmetric(size)
            assert torch.equal(unpack_symmetric(pack_symmetric(matrix, torch.float32), size), matrix)


def test_packed_values_have_the_dtype_and_unpacked_ones_are_float32(width):
    packed = pack_symmetric(symmetric(6), torch.float16)
    assert packed.dtype is torch.float16
    assert unpack_symmetric(packed, 6).dtype is torch.float32


def test_packed_size_is_the_number_of_elements_of_the_panels(width):
    assert packed_size(11) == 11 * 4 + 7 * 4 + 3 * 3
    assert len(pack_symmetric(symmetric(11), torch.float32)) == packed_size(11)


def test_panels_are_views_from_the_diagonal_down():
    packed = torch.zeros(packed_size(11, 4))
    found = [(start, stop, tuple(panel.shape)) for start, stop, panel in iter_panels(packed, 11, 4)]
    assert found == [(0, 4, (11, 4)), (4, 8, (7, 4)), (8, 11, (3, 3))]
    for _, _, panel in iter_panels(packed, 11, 4):
        panel.fill_(1)
    assert packed.all()


def test_large_matrices_take_little_more_than_half():
    assert packed_size(15360) < 0.57 * 15360**2
