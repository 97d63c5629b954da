"""Recipes: which layer is stored in which format; presets as data, layer rules, recognition of model families."""

from .aliases import FORMAT_ALIASES, choose_format, make_format
from .eight_bits import describe_uncalibrated
from .option_table import OPTION_TABLE
from .plan import Decision, Plan, make_plan
from .presets import PRESETS, Preset, find_preset, recognize_preset
from .recipe import Recipe
from .recommended import recommend_format

__all__ = [
    "FORMAT_ALIASES",
    "OPTION_TABLE",
    "PRESETS",
    "Decision",
    "Plan",
    "Preset",
    "Recipe",
    "choose_format",
    "describe_uncalibrated",
    "find_preset",
    "make_format",
    "make_plan",
    "recognize_preset",
    "recommend_format",
]
