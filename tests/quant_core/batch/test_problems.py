"""Problems of a plan are collected; the sentences are in test_plan_file.py."""

import pytest

from learned_rounding.quant_core.batch.problems import Problems, show
from learned_rounding.quant_core.errors import OutputError, RecipeError


@pytest.fixture
def problems(tmp_path):
    return Problems(tmp_path / "plan.toml")


def test_without_problems_nothing_is_raised(problems):
    problems.raise_first()
    assert len(problems) == 0


def test_the_first_of_several_problems_is_raised_with_its_fields(problems):
    problems.add(OutputError, "one.", "output")
    problems.add(RecipeError, "two.")
    with pytest.raises(OutputError) as caught:
        problems.raise_first()
    assert (caught.value.file, caught.value.option) == (str(problems.path), "output")


def test_the_number_of_problems_is_given(problems):
    for text in ("one.", "two.", "three."):
        problems.add(RecipeError, text)
    with pytest.raises(RecipeError, match="3 problems"):
        problems.raise_first()


def test_known_keys_of_the_right_type_are_kept(problems):
    table = {"a": 1, "b": True, "c": "x", "d": []}
    assert problems.check_table("x", table, {"a": str, "b": bool, "c": str}, ["d"]) == {"b": True, "c": "x", "d": []}
    assert len(problems) == 1


def test_values_are_shortened():
    assert len(show("x" * 1000)) <= 100
