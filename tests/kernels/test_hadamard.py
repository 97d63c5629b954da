"""Regular Hadamard matrices, and the rotation of groups of channels by them."""

import torch

from learned_rounding.kernels.hadamard import hadamard, rotate


def test_the_matrix_is_orthogonal(subtests):
    for size in (4, 16, 64, 256):
        matrix = hadamard(size)
        with subtests.test(size=size):
            # All entries are ±1/√size, a power of two: products are exact.
            assert torch.equal(matrix @ matrix.t(), torch.eye(size))


def test_the_matrix_is_symmetric(subtests):
    for size in (4, 16, 64, 256):
        with subtests.test(size=size):
            assert torch.equal(hadamard(size), hadamard(size).t())


def test_all_entries_have_the_same_magnitude(subtests):
    for size in (4, 16, 64, 256):
        with subtests.test(size=size):
            assert (hadamard(size).abs() == size**-0.5).all()


def test_every_row_has_the_same_sum(subtests):
    """A constant stays constant."""
    for size in (4, 16, 64, 256):
        with subtests.test(size=size):
            assert hadamard(size).sum(dim=0).unique().tolist() == [1.0]


def test_groups_of_adjacent_channels_are_multiplied_by_the_matrix():
    values = torch.randn(3, 128, generator=torch.Generator().manual_seed(0))
    expected = torch.cat([values[:, :64] @ hadamard(64), values[:, 64:] @ hadamard(64)], dim=1)
    torch.testing.assert_close(rotate(values, 64), expected)


def test_groups_larger_than_one_matrix_are_multiplied_by_two(subtests):
    values = torch.randn(2, 4096, generator=torch.Generator().manual_seed(0))
    for size in (1024, 4096):
        expected = values.double().unflatten(1, (-1, size)) @ hadamard(size).double()
        with subtests.test(size=size):
            torch.testing.assert_close(rotate(values, size), expected.flatten(1).float(), rtol=1e-5, atol=1e-5)


def test_the_result_is_float32_of_the_same_shape():
    rotated = rotate(torch.ones(2, 3, 64, dtype=torch.bfloat16), 16)
    assert rotated.dtype is torch.float32
    assert rotated.shape == (2, 3, 64)
