"""One base for all errors, one sentence each."""

import pytest

from learned_rounding.quant_core import QuantizationError, errors
from learned_rounding.quant_core.errors import UnknownNameError


def test_all_errors_have_one_base():
    assert all(issubclass(getattr(errors, name), QuantizationError) for name in errors.__all__)
    defined = {name for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, Exception)}
    assert defined == set(errors.__all__)


@pytest.mark.parametrize(
    "name, text",
    [
        ("tensr", "There is no granularity 'tensr': did you mean 'tensor'?"),
        ("zzz", "There is no granularity 'zzz'; known are row, tensor."),
        (5, "There is no granularity '5'; known are row, tensor."),
    ],
)
def test_unknown_names(name, text):
    assert str(UnknownNameError("granularity", name, ["tensor", "row"])) == text
