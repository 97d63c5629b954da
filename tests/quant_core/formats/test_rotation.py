"""ConvRot: an orthogonal rotation that changes no product."""

import torch

from learned_rounding.kernels.hadamard import hadamard
from learned_rounding.quant_core.errors import RecipeError
from learned_rounding.quant_core.formats import Rotation, rotation_groups


def test_products_survive(subtests):
    generator = torch.Generator().manual_seed(0)
    weight, inputs = torch.randn(5, 512, generator=generator), torch.randn(40, 512, generator=generator)
    for size in (16, 64, 256):
        rotation = Rotation(size)
        with subtests.test(size=size):
            product = rotation.apply(inputs) @ rotation.apply(weight).t()
            torch.testing.assert_close(product, inputs @ weight.t(), rtol=1e-4, atol=1e-4)


def test_the_rotation_is_its_own_inverse(subtests):
    weight = torch.randn(5, 512, generator=torch.Generator().manual_seed(0))
    for size in (16, 64, 256):
        rotation = Rotation(size)
        with subtests.test(size=size):
            torch.testing.assert_close(rotation.apply(rotation.apply(weight)), weight, rtol=1e-4, atol=1e-5)


def test_the_hessian_is_that_of_the_rotated_activations(subtests):
    inputs = torch.randn(40, 512, generator=torch.Generator().manual_seed(0))
    for size in (16, 64, 256):
        rotation = Rotation(size)
        rotated = rotation.apply(inputs)
        with subtests.test(size=size):
            torch.testing.assert_close(
                rotation.apply_hessian(inputs.t() @ inputs), rotated.t() @ rotated, rtol=1e-4, atol=1e-3
            )


def test_groups_of_other_tools(subtests):
    """Powers of four that this project does not choose; large ones without a matrix of their size."""
    values = torch.randn(3, 8192, generator=torch.Generator().manual_seed(0))
    for size in (4, 1024, 4096):
        rotated = Rotation(size).apply(values)
        expected = values.double().unflatten(1, (-1, size)) @ hadamard(size).double()
        with subtests.test(size=size):
            torch.testing.assert_close(rotated, expected.flatten(1).float(), rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(Rotation(size).apply(rotated), values, rtol=1e-5, atol=1e-5)


def test_a_hostile_group_takes_no_memory_for_its_matrix():
    """The matrix of a group of 4¹⁰ would take 4 TB."""
    values = torch.randn(1, 4**10, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(Rotation(4**10).apply(Rotation(4**10).apply(values)), values, rtol=1e-4, atol=1e-4)


def test_sizes_that_are_no_power_of_four_are_refused(subtests, sentences):
    for size in (0, 1, 2, 8, 32, 128, 512, 2048, -4, 256.0, True):
        with subtests.test(size=size), sentences.raises(RecipeError):
            Rotation(size)


def test_an_outlier_spreads_over_its_group_alone():
    weight = torch.zeros(1, 128)
    weight[0, 70] = 8.0
    rotated = Rotation(64).apply(weight)
    assert not rotated[0, :64].any()
    assert (rotated[0, 64:].abs() == 1).all()


GROUPS = [  # option, input channels, groups that are tried
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
]


def test_the_largest_group_that_divides_is_taken(subtests):
    for convrot, inner, groups in GROUPS:
        with subtests.test(convrot=convrot, inner=inner):
            assert rotation_groups(convrot, inner) == groups


def test_other_groups_are_refused(subtests, sentences):
    for convrot in (1, 4, 32, 1024, "on", 2.5):
        with subtests.test(convrot=convrot), sentences.raises(RecipeError):
            rotation_groups(convrot, 512)


def test_channels_that_no_group_divides_are_refused(sentences):
    with sentences.raises(RecipeError):
        Rotation(64).apply(torch.zeros(2, 100))
