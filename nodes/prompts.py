"""Prompts from the text of a widget."""

from ..quant_core.errors import RecipeError

__all__ = ["prompt_lines"]


def prompt_lines(text: str) -> list[str]:
    """Split a text into prompts, one per line; blank lines are skipped. Raises RecipeError where there is none."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        raise RecipeError("The list of prompts is empty; enter at least one prompt, one per line.")
    return lines
