"""The recipe that the options of ``lrq`` describe."""

import argparse
import dataclasses
import json
from pathlib import Path

from ..errors import RecipeError
from ..formats import FormatConfig
from ..recipes import Recipe, choose_format, make_format, recommend_format
from ..recipes.layers import LONGEST_TEXT, parse_layer_config
from ..recipes.option_table import OPTION_TABLE
from ..recipes.presets import AUTO

__all__ = ["build_recipe", "layer_config_file"]

_FORMAT_FIELDS = [field.name for field in dataclasses.fields(FormatConfig) if field.name != "name"]


def build_recipe(args: argparse.Namespace) -> Recipe:
    """The recipe file, if one is given, with the other options on top.

    Raises:
        RecipeError: a file cannot be read, or options contradict each other.
    """
    recipe = _read_recipe(args.recipe) if args.recipe else Recipe()
    given = {name: getattr(args, name) for options in OPTION_TABLE.values() for name in options}
    given |= {"layer_config": _merge_layer_config(args), "convrot": _merge_convrot(args)}
    given = {name: value for name, value in given.items() if value is not None}
    options = {name: given.pop(name) for name in _FORMAT_FIELDS if name in given}
    given["format"] = _choose_format(recipe.format, given.get("format"), options)
    return Recipe.from_dict({**_without_format(recipe), **given})


def layer_config_file(args: argparse.Namespace) -> Path | None:
    """The file that --layer-config names; None if it is the rules themselves."""
    text = getattr(args, "layer_config", None)
    return Path(text) if text is not None and not text.lstrip().startswith("{") else None


def _without_format(recipe: Recipe) -> dict[str, object]:
    return {name: value for name, value in recipe.to_dict().items() if name not in ("format", *_FORMAT_FIELDS)}


def _choose_format(current: FormatConfig, name: str | None, options: dict) -> FormatConfig:
    """The format of the options; a new format drops the choices of the recipe within its own."""
    if name == AUTO:
        best = recommend_format()
        return choose_format(best.name, **{"granularity": best.granularity, **options})
    if name is not None:
        return choose_format(name, **{"full_precision_matmul": current.full_precision_matmul, **options})
    choices = {field: getattr(current, field) for field in _FORMAT_FIELDS}
    return make_format(current.name, **{**choices, **options}, sibling="granularity" in options)


def _read_recipe(path: Path) -> Recipe:
    text = _read_text(path, "recipe")
    return (Recipe.from_json if path.suffix == ".json" else Recipe.from_toml)(text)


def _read_text(path: Path, kind: str) -> str:
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read(LONGEST_TEXT + 1)
        if len(text) > LONGEST_TEXT:
            raise ValueError(f"it has more than {LONGEST_TEXT:,} characters")
        return text
    except (OSError, ValueError) as error:
        raise RecipeError(f"The {kind} {path} cannot be read: {getattr(error, 'strerror', None) or error}.") from None


def _merge_convrot(args: argparse.Namespace) -> bool | int | str | None:
    """--convrot and --convrot-group-size as one value; None without either."""
    size = args.convrot_group_size
    if size is not None and args.convrot not in (None, size) and args.convrot is not True:
        raise RecipeError(
            f"--convrot {args.convrot} and --convrot-group-size {size} contradict each other; leave one out."
        )
    return args.convrot if size is None else size


def _merge_layer_config(args: argparse.Namespace) -> str | None:
    """--layer-config and --custom-layers as one text; None without either."""
    if bool(args.custom_layers) != bool(args.custom_type):
        raise RecipeError("--custom-layers and --custom-type go together: the layers, and their format.")
    file = layer_config_file(args)
    text = _read_text(file, "layer config") if file else args.layer_config
    if not args.custom_layers:
        return text
    given = {rule.pattern: rule.format for rule in parse_layer_config(text or "")}
    custom = dict.fromkeys(args.custom_layers, args.custom_type)
    for rule in parse_layer_config(json.dumps(custom)):
        if given.get(rule.pattern, rule.format) != rule.format:
            raise RecipeError(
                f"--custom-layers and --layer-config contradict each other for '{rule.pattern}'; leave one out."
            )
    return json.dumps({**json.loads(text or "{}"), **custom})
