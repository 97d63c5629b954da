"""Relative error of several outputs over several calls."""

import math

import pytest
import torch

from learned_rounding.quant_core.sequential.errors import ErrorSum

EXACT = torch.tensor([3.0, 4.0])  # of norm 5


def error_of(*calls) -> float:
    """The error of calls (outputs found, exact outputs, weight)."""
    errors = ErrorSum()
    for found, exact, weight in calls:
        errors.add(found, exact, weight)
    return errors.value


def test_error_of_one_output_is_relative_to_its_norm():
    assert error_of(([EXACT + torch.tensor([0.0, 1.0])], [EXACT], 1.0)) == pytest.approx(1 / 5)


def test_equal_outputs_have_no_error():
    assert error_of(([EXACT], [EXACT], 1.0)) == 0.0


def test_nothing_has_no_error():
    assert error_of() == 0.0


def test_squares_are_summed_over_calls_with_their_weights():
    calls = [([EXACT + 1], [EXACT], 3.0), ([2 * EXACT], [2 * EXACT], 1.0)]
    assert error_of(*calls) == pytest.approx(math.sqrt(3 * 2 / (3 * 25 + 100)))


def test_outputs_have_equal_shares_whatever_their_size():
    found, exact = [EXACT * 2, EXACT * 1000], [EXACT, EXACT * 1000]
    assert error_of((found, exact, 1.0)) == pytest.approx(math.sqrt(1 / 2))


def test_integer_outputs_and_those_that_are_zero_are_left_out():
    found, exact = [torch.tensor([3]), torch.ones(2), EXACT * 2], [torch.tensor([1]), torch.zeros(2), EXACT]
    assert error_of((found, exact, 1.0)) == pytest.approx(1.0)


def test_error_of_outputs_that_are_not_finite_is_nan():
    assert math.isnan(error_of(([EXACT * torch.nan], [EXACT], 1.0)))


def test_half_precision_outputs_do_not_overflow():
    large = torch.full((1000,), 60000.0, dtype=torch.float16)
    assert error_of(([large / 2], [large], 1.0)) == pytest.approx(0.5)
