"""Which layer gets what: recipes, presets as data, rules, detection by layer names."""

from .plan import Decision, Plan, make_plan
from .presets import PRESETS, Preset, find_preset, recognise
from .recipe import Recipe

__all__ = ["Decision", "Plan", "make_plan", "PRESETS", "Preset", "find_preset", "recognise", "Recipe"]
