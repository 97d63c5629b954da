"""Options: what they accept, and how they are described."""

import pytest

from learned_rounding.quant_core.errors import RecipeError, UnknownNameError
from learned_rounding.quant_core.option import Option

COUNT = Option(help="steps", kind=int, default=500, low=1, high=1_000_000)
RATE = Option(help="rate", kind=float, low=0, high=1)
SWITCH = Option(help="switch", kind=bool, default=False)
NAME = Option(help="name", choices=("one", "two"), default="one")


def test_values_of_the_kind_and_range_are_accepted(subtests):
    for option, value in ((COUNT, 1), (COUNT, 1_000_000), (RATE, 0.5), (RATE, 1), (SWITCH, True), (NAME, "two")):
        with subtests.test(option.help, value=value):
            option.check("option", value)


def test_values_of_another_kind_are_refused(subtests):
    for option, value in (
        (COUNT, 1.0),
        (COUNT, "1"),
        (COUNT, True),
        (RATE, True),
        (SWITCH, 1),
        (NAME, 1),
        (COUNT, None),
    ):
        with subtests.test(option.help, value=value), pytest.raises(RecipeError, match=f"^option cannot be {value!r}"):
            option.check("option", value)


def test_numbers_out_of_range_are_refused(subtests):
    for option, value in ((COUNT, 0), (COUNT, 1_000_001), (RATE, -0.1), (RATE, float("nan"))):
        with subtests.test(option.help, value=value), pytest.raises(RecipeError, match=r"^option must be between"):
            option.check("option", value)


def test_unknown_choices_are_refused():
    with pytest.raises(UnknownNameError) as caught:
        NAME.check("option", "twoo")
    assert caught.value.name == "twoo"


def test_the_description_has_range_and_default():
    assert COUNT.describe() == "steps (1 to 1,000,000; default: 500)"
    assert RATE.describe() == "rate (0 to 1)"


def test_the_description_has_choices_that_the_help_does_not_explain():
    assert NAME.describe() == "name (one, two; default: one)"
    explained = Option(help="one for speed, two for quality", choices=("one", "two"))
    assert explained.describe() == "one for speed, two for quality"


def test_a_default_that_says_nothing_is_left_out():
    assert SWITCH.describe() == "switch"


def test_details_can_be_left_out():
    assert COUNT.describe(details=False) == "steps"


def test_the_scope_is_part_of_the_description():
    class Scoped(Option):
        scope = "nvfp4"

    assert Scoped(help="smoothing", kind=bool).describe() == "smoothing (for nvfp4)"
