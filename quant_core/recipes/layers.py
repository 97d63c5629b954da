"""Layer rules of the user: a format, or full precision, for layers by name. The most specific rule decides."""

import itertools
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from ..cancellation import CancelCheck
from ..errors import RecipeError
from ..formats import FormatConfig
from .aliases import make_format
from .patterns import LARGEST, Pattern, SearchBudget

__all__ = [
    "LONGEST_TEXT",
    "LayerRule",
    "check_length",
    "find_rules",
    "most_specific",
    "parse_layer_config",
    "parse_rules",
]

LONGEST_TEXT = 1_000_000  # characters of a layer config or a recipe: five times all patterns together
_LEAST = 40  # characters that a rule counts at least: it takes time however short it is
SKIP = "skip"
# Key of a rule → field of a FormatConfig.
_KEYS = {
    "format": "name",
    "granularity": "granularity",
    "block_size": "block_size",
    "convrot": "convrot",
    "full_precision_matrix_mult": "full_precision_matmul",
    "bits": "bits",
    "linear_dtype": "linear_dtype",
}


@dataclass(frozen=True)
class LayerRule:
    """Format of the layers in whose tensor name ``pattern`` is found; None: they stay in full precision."""

    pattern: str
    format: FormatConfig | None
    origin: str

    @property
    def reason(self) -> str:
        """For people: "layer config img_mlp"."""
        return f"{self.origin} {self.pattern}"


def check_length(text: str, what: str) -> None:
    """Raise :class:`RecipeError` if a text of a user, the ``what`` of a run, is too long to be parsed."""
    if len(text) > LONGEST_TEXT:
        raise RecipeError(f"The {what} has {len(text):,} characters, more than {LONGEST_TEXT:,}; use fewer rules.")


def find_rules(
    rules: Iterable[LayerRule], names: Iterable[str], check: CancelCheck | None = None
) -> dict[str, list[LayerRule]]:
    """Name → rules whose pattern is found in it, in their order.

    Raises:
        RecipeError: the searches take too long.
    """
    found: dict[str, list[LayerRule]] = {name: [] for name in names}
    budget, searched = SearchBudget(), list(found)
    for rule in rules:
        for name in budget.find(Pattern(rule.pattern), searched, check):
            found[name].append(rule)
    return found


def most_specific(found: Sequence[LayerRule], name: str) -> LayerRule | None:
    """Of the rules found in ``name``: one whose pattern is the layer's name, else the one with the longest pattern.

    Of equally long ones, one that keeps the layer in full precision, else the last.
    """
    layer = name.removesuffix(".weight")
    return max(
        reversed(found),
        key=lambda rule: (rule.pattern in (name, layer), len(rule.pattern), rule.format is None),
        default=None,
    )


def parse_rules(keep: Iterable[str], config: str) -> tuple[LayerRule, ...]:
    """Rules of keep patterns and of a layer config, see :func:`parse_layer_config`.

    Raises:
        RecipeError: the layer config or a pattern is not valid, or the patterns are too large together.
    """
    rules: list[LayerRule] = []
    kept = (LayerRule(pattern, None, "keep pattern") for pattern in keep)
    total = 0
    for rule in itertools.chain(kept, parse_layer_config(config)):
        try:
            total += max(Pattern(rule.pattern).size, _LEAST)
        except RecipeError as error:
            raise RecipeError(f"The {rule.origin}: {error}") from None
        if total > LARGEST:
            raise RecipeError(
                f"The {rule.origin}: all patterns have more than {LARGEST:,} characters and repeats together; use fewer or simpler ones."
            )
        rules.append(rule)
    return tuple(rules)


def parse_layer_config(text: str) -> tuple[LayerRule, ...]:
    """Rules in JSON: ``{"PATTERN": {"format": "int8", "granularity": "row"}, "PATTERN": "fp8", "PATTERN": "skip"}``.

    A pattern is a regular expression for tensor names. ``format`` is a format name or alias, see
    :func:`~.aliases.make_format`. Other keys are ``granularity``, ``block_size``, ``convrot`` and
    ``full_precision_matrix_mult``; ``{"skip": true}`` keeps layers in full precision.

    Raises:
        RecipeError: the text is not such a JSON object.
    """
    check_length(text, "layer config")
    if not text.strip():
        return ()
    try:
        entries = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RecipeError(f"The layer config is not valid JSON: {error}.") from None
    if not isinstance(entries, dict):
        raise RecipeError('The layer config must be a JSON object: {"PATTERN": {"format": "NAME"}}.')
    return tuple(
        LayerRule(pattern, _parse_format(pattern, value), "layer config") for pattern, value in entries.items()
    )


def _parse_format(pattern: str, value: object) -> FormatConfig | None:
    if isinstance(value, str):
        value = {SKIP: True} if value == SKIP else {"format": value}
    if value == {SKIP: True}:
        return None
    if not isinstance(value, dict) or "format" not in value:
        raise RecipeError(f"The layer config has neither a format nor \"{SKIP}\" for '{pattern}'.")
    unknown = next((key for key in value if key not in _KEYS), None)
    if unknown is not None:
        raise RecipeError(
            f"The layer config has an unknown key '{unknown}', at '{pattern}'; known are {', '.join([*_KEYS, SKIP])}."
        )
    fields: dict[str, Any] = {_KEYS[key]: entry for key, entry in value.items()}
    try:
        config = make_format(**fields, sibling=True)
    except RecipeError as error:
        raise RecipeError(f"The layer config, at '{pattern}': {error}") from None
    if config.measured:
        raise RecipeError(f"The layer config, at '{pattern}': format {config.name} is for whole models; name a format.")
    return config
