"""All errors have one base class and carry what they concern as fields."""

import copy
import pickle

import pytest

from learned_rounding.quant_core import QuantizationError, errors
from learned_rounding.quant_core.errors import RecipeError, UnknownNameError


def test_all_errors_have_one_base():
    assert all(issubclass(getattr(errors, name), QuantizationError) for name in errors.__all__)
    defined = {name for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, Exception)}
    assert defined == set(errors.__all__)


@pytest.mark.parametrize("name", ["tensr", "zzz", 5])
def test_unknown_names(name, sentences):
    error = UnknownNameError("granularity", name, ["tensor", "row"])
    assert (error.kind, error.name, error.known, error.option) == (
        "granularity",
        name,
        ["row", "tensor"],
        "granularity",
    )
    sentences(error)


def test_fields_are_optional():
    error = QuantizationError("A message.")
    assert (str(error), error.file, error.tensor, error.option) == ("A message.", None, None, None)


@pytest.mark.parametrize(
    "duplicate", [copy.copy, lambda error: pickle.loads(pickle.dumps(error))], ids=["copy", "pickle"]
)
@pytest.mark.parametrize(
    "error",
    [
        RecipeError("A message.", file="a.toml", tensor="blocks.0.weight", option="seed"),
        UnknownNameError("format", "int9", ["int8_tensorwise"]),
    ],
    ids=["fields", "unknown name"],
)
def test_errors_are_copied_and_pickled_with_their_fields(error, duplicate):
    other = duplicate(error)
    assert type(other) is type(error) and str(other) == str(error) and vars(other) == vars(error)
