"""ConvRot: an orthogonal rotation that changes no product."""

import pytest
import torch

from learned_rounding.kernels.hadamard import hadamard
from learned_rounding.quant_core.errors import RecipeError
from learned_rounding.quant_core.formats import Rotation, rotation_groups


@pytest.mark.parametrize("size", [16, 64, 256])
def test_the_matrix_is_orthogonal_symmetric_and_regular(size):
    matrix = hadamard(size)
    assert torch.equal(matrix @ matrix.t(), torch.eye(size))  # all entries are ±1/√size, a power of two: exact
    assert torch.equal(matrix, matrix.t())
    assert (matrix.abs() == size**-0.5).all()
    assert matrix.sum(dim=0).unique().tolist() == [1.0]  # every row sums to the same: a constant stays constant


@pytest.mark.parametrize("size", [16, 64, 256])
def test_products_and_grams_survive(size):
    generator = torch.Generator().manual_seed(0)
    weight, inputs = torch.randn(5, 512, generator=generator), torch.randn(40, 512, generator=generator)
    rotation = Rotation(size)
    torch.testing.assert_close(
        rotation.apply(inputs) @ rotation.apply(weight).t(), inputs @ weight.t(), rtol=1e-4, atol=1e-4
    )
    torch.testing.assert_close(rotation.apply(rotation.apply(weight)), weight, rtol=1e-4, atol=1e-5)
    rotated = rotation.apply(inputs)
    torch.testing.assert_close(rotation.apply_hessian(inputs.t() @ inputs), rotated.t() @ rotated, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("size", [4, 1024, 4096])
def test_groups_of_other_tools(size):
    """Powers of four that this project does not choose; large ones without a matrix of their size."""
    values = torch.randn(3, 8192, generator=torch.Generator().manual_seed(0))
    rotated = Rotation(size).apply(values)
    expected = values.double().unflatten(1, (-1, size)) @ hadamard(size).double()
    torch.testing.assert_close(rotated, expected.flatten(1).float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(Rotation(size).apply(rotated), values, rtol=1e-5, atol=1e-5)


def test_a_hostile_group_takes_no_memory_for_its_matrix():
    """The matrix of a group of 4¹⁰ would take 4 TB."""
    values = torch.randn(1, 4**10, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(Rotation(4**10).apply(Rotation(4**10).apply(values)), values, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", [0, 1, 2, 8, 32, 128, 512, 2048, -4, 256.0, True])
def test_sizes_that_are_no_power_of_four_are_refused(size, sentences):
    with sentences.raises(RecipeError):
        Rotation(size)


def test_an_outlier_spreads_over_its_group_alone():
    weight = torch.zeros(1, 128)
    weight[0, 70] = 8.0
    rotated = Rotation(64).apply(weight)
    assert not rotated[0, :64].any() and (rotated[0, 64:].abs() == 1).all()


@pytest.mark.parametrize(
    "convrot, inner, groups",
    [
        (None, 512, [None]),
        (False, 512, [None]),
        (True, 512, [256]),
        (True, 192, [64]),
        (True, 48, [16]),
        (True, 100, [None]),
        (64, 512, [64]),
        (256, 192, [64]),
        (16, 512, [16]),
        ("auto", 512, [None, 256, 64, 16]),
        ("auto", 80, [None, 16]),
        ("auto", 7, [None]),
        ("auto", 2048, [None, 256, 64, 16, 1024]),
        ("auto", 8192, [None, 256, 64, 16, 4096, 1024]),
    ],
)
def test_the_largest_group_that_divides_is_taken(convrot, inner, groups):
    assert rotation_groups(convrot, inner) == groups


@pytest.mark.parametrize("convrot", [1, 4, 32, 1024, "on", 2.5])
def test_other_groups_are_refused(convrot, sentences):
    with sentences.raises(RecipeError):
        rotation_groups(convrot, 512)


def test_channels_that_no_group_divides_are_refused(sentences):
    with sentences.raises(RecipeError):
        Rotation(64).apply(torch.zeros(2, 100))
