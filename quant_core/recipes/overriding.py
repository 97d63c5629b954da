"""Recipes in parts: a recipe file, and options on top of it."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import RecipeError
from ..formats import FormatConfig
from .aliases import choose_format, make_format
from .layers import LONGEST_TEXT
from .presets import AUTO
from .recipe import Recipe
from .recommended import recommend_format

__all__ = ["override_recipe", "read_recipe", "read_text"]

_FORMAT_FIELDS = [field.name for field in dataclasses.fields(FormatConfig) if field.name != "name"]


def override_recipe(recipe: Recipe, given: Mapping[str, Any]) -> Recipe:
    """The recipe with some fields replaced; a new format drops the choices of the recipe within its own.

    Args:
        recipe: recipe that is not changed.
        given: fields by their keys in a recipe file; format "auto" is the recommended one of this machine.

    Raises:
        RecipeError: an unknown field, or fields that contradict each other.
    """
    given = dict(given)
    options = {name: given.pop(name) for name in _FORMAT_FIELDS if name in given}
    given["format"] = _choose_format(recipe.format, given.get("format"), options)
    return Recipe.from_dict({**_without_format(recipe), **given})


def read_recipe(path: Path) -> Recipe:
    """The recipe of a file in TOML, or in JSON by its suffix. Raises RecipeError."""
    text = read_text(path, "recipe")
    return (Recipe.from_json if path.suffix == ".json" else Recipe.from_toml)(text)


def read_text(path: Path, kind: str) -> str:
    """The text of a file of bounded length; ``kind``: what it is. Raises RecipeError."""
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read(LONGEST_TEXT + 1)
        if len(text) > LONGEST_TEXT:
            raise ValueError(f"it has more than {LONGEST_TEXT:,} characters")
        return text
    except (OSError, ValueError) as error:
        raise RecipeError(f"The {kind} {path} cannot be read: {getattr(error, 'strerror', None) or error}.") from None


def _without_format(recipe: Recipe) -> dict[str, object]:
    return {name: value for name, value in recipe.to_dict().items() if name not in ("format", *_FORMAT_FIELDS)}


def _choose_format(current: FormatConfig, name: str | None, options: dict) -> FormatConfig:
    if name == AUTO:
        best = recommend_format()
        return choose_format(best.name, **{"granularity": best.granularity, **options})
    if name is not None:
        return choose_format(name, **{"full_precision_matmul": current.full_precision_matmul, **options})
    choices = {field: getattr(current, field) for field in _FORMAT_FIELDS}
    return make_format(current.name, **{**choices, **options}, sibling="granularity" in options)
