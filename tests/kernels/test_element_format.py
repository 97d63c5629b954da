"""Arithmetic of element formats: spacing and range describe every representable value."""

import torch

from learned_rounding.kernels.reference.rounding import element_step
from learned_rounding.tests.kernels.element_formats import ELEMENTS


def representable(element) -> torch.Tensor:
    """All values of the dtype up to the largest one of the element format that it rounds to itself."""
    values = torch.arange(256, dtype=torch.int16).to(torch.uint8).view(element.dtype).float()
    values = values[values.isfinite() & (values.abs() <= element.max)]
    return values[element.encode(values.clone()).float() == values].unique()


def test_values_are_multiples_of_the_spacing(subtests):
    for name, element in ELEMENTS.items():
        values = representable(element)
        with subtests.test(name):
            steps = values / element_step(values, element.arithmetic)
            assert torch.equal(steps, steps.round())


def test_the_spacing_is_the_distance_of_neighbours(subtests):
    for name, element in ELEMENTS.items():
        values = representable(element)
        positive = values[values >= 0]
        step = element_step(positive[:-1], element.arithmetic)
        with subtests.test(name):
            assert torch.equal(positive.diff(), torch.as_tensor(step).expand_as(positive.diff()))


def test_the_largest_magnitude_is_that_of_the_element_format(subtests):
    for name, element in ELEMENTS.items():
        with subtests.test(name):
            assert element.arithmetic.largest == element.max


def test_only_integers_have_no_mantissa(subtests):
    for name, element in ELEMENTS.items():
        with subtests.test(name):
            assert (element.arithmetic.mantissa < 0) == (not element.floating)
