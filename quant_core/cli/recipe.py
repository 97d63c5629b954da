"""The recipe that the options of ``lrq`` describe."""

import argparse
import json
from pathlib import Path

from ..errors import RecipeError
from ..recipes import Recipe
from ..recipes.layers import parse_layer_config
from ..recipes.option_table import OPTION_TABLE
from ..recipes.overriding import override_recipe, read_recipe, read_text

__all__ = ["build_recipe", "layer_config_file"]


def build_recipe(args: argparse.Namespace) -> Recipe:
    """The recipe file, if one is given, with the other options on top.

    Raises:
        RecipeError: a file cannot be read, or options contradict each other.
    """
    recipe = read_recipe(args.recipe) if args.recipe else Recipe()
    given = {name: getattr(args, name) for options in OPTION_TABLE.values() for name in options}
    given |= {"layer_config": _merge_layer_config(args), "convrot": _merge_convrot(args)}
    return override_recipe(recipe, {name: value for name, value in given.items() if value is not None})


def layer_config_file(args: argparse.Namespace) -> Path | None:
    """The file that --layer-config names; None if it is the rules themselves."""
    text = getattr(args, "layer_config", None)
    return Path(text) if text is not None and not text.lstrip().startswith("{") else None


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
    text = read_text(file, "layer config") if file else args.layer_config
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
