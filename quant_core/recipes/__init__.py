"""Which layer gets what: recipes, presets as data, rules, detection by layer names."""

from .layers import FormatChoice
from .plan import Decision, Plan, make_plan
from .presets import PRESETS, Preset, find_preset, recognise
from .recipe import MEASURED, MEASURED_CHOOSES, MEASURED_ONLY, Recipe
from .recommended import recommended_format

__all__ = [
    "Decision",
    "FormatChoice",
    "Plan",
    "make_plan",
    "PRESETS",
    "Preset",
    "find_preset",
    "recognise",
    "MEASURED",
    "MEASURED_CHOOSES",
    "MEASURED_ONLY",
    "Recipe",
    "recommended_format",
]
