"""Recipes: which layer is stored in which format; presets as data, layer rules, recognition of model families."""

from .aliases import FORMAT_ALIASES, choose_format, make_format
from .eight_bits import describe_uncalibrated
from .option_table import OPTION_TABLE
from .plan import Decision, Plan, make_plan
from .presets import PRESETS, Preset, find_preset, recognize_preset
from .recipe import Recipe
from .recommended import recommend_format

__all__ = [
    "Decision",
    "Plan",
    "make_plan",
    "PRESETS",
    "Preset",
    "find_preset",
    "recognize_preset",
    "FORMAT_ALIASES",
    "describe_uncalibrated",
    "choose_format",
    "make_format",
    "OPTION_TABLE",
    "Recipe",
    "recommend_format",
]
