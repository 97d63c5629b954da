"""Prompts as a text box holds them."""

from ..quant_core.errors import RecipeError

__all__ = ["prompt_lines"]


def prompt_lines(text: str) -> list[str]:
    """One prompt a line, without blank ones. Raises RecipeError when there are none."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        raise RecipeError("There are no prompts here; write some, one a line.")
    return lines
