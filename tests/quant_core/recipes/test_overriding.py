"""Options on top of a recipe, and recipe files; the command line's own tests have all options."""

import pytest

from learned_rounding.quant_core import Recipe
from learned_rounding.quant_core.errors import RecipeError
from learned_rounding.quant_core.recipes import recommend_format
from learned_rounding.quant_core.recipes.layers import LONGEST_TEXT
from learned_rounding.quant_core.recipes.overriding import override_recipe, read_recipe, read_text

BASE = Recipe(format="int8_tensorwise", granularity="tensor", rounding="nearest", seed=5)


def test_nothing_given_is_the_recipe_itself():
    assert override_recipe(BASE, {}) == BASE


def test_a_field_is_replaced_and_the_others_stay():
    assert override_recipe(BASE, {"seed": 6}).to_dict() == {**BASE.to_dict(), "seed": 6}


def test_a_new_format_drops_the_choices_within_the_old_one():
    assert override_recipe(BASE, {"format": "float8_e4m3fn_rowwise"}).format.granularity == "row"


def test_int8_per_row_has_convrot_auto_as_in_new_recipes():
    assert override_recipe(Recipe(), {"format": "int8"}).format.convrot == "auto"


def test_format_auto_is_the_recommended_one():
    assert override_recipe(BASE, {"format": "auto"}).format.name == recommend_format().name


def test_the_given_options_are_not_changed():
    given = {"format": "int8", "granularity": "row", "seed": 1}
    override_recipe(BASE, given)
    assert given == {"format": "int8", "granularity": "row", "seed": 1}


def test_an_unknown_field_is_refused():
    with pytest.raises(RecipeError):
        override_recipe(BASE, {"formt": "int8"})


def test_a_recipe_file_is_read_by_its_suffix(tmp_path, subtests):
    for name, text in {"a.toml": BASE.to_toml(), "a.json": BASE.to_json()}.items():
        with subtests.test(name):
            (tmp_path / name).write_text(text, encoding="utf-8")
            assert read_recipe(tmp_path / name) == BASE


def test_a_text_that_cannot_be_read_is_refused_in_one_sentence(tmp_path, sentences, subtests):
    (tmp_path / "long.toml").write_text("#" * (LONGEST_TEXT + 1), encoding="utf-8")
    (tmp_path / "latin.toml").write_bytes(b"# \xe4\n")
    for name in ("none.toml", "long.toml", "latin.toml"):
        with subtests.test(name), pytest.raises(RecipeError) as caught:
            read_text(tmp_path / name, "recipe")
        sentences(caught.value)
