"""A user's own rules for single layers: a format, or full precision. The most specific one decides."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ..cancellation import CancelCheck
from ..errors import RecipeError
from ..formats import with_granularity
from .patterns import Pattern

__all__ = ["FormatChoice", "LayerRule", "finding", "layer_rules", "most_specific", "parse_layer_config"]

SKIP = "skip"
_LARGEST = 200_000  # characters and states of all patterns; two thousand names of layers
# Short names of formats, as on the command line.
SHORT = {"fp8": "float8_e4m3fn", "int8": "int8_tensorwise"}
# Key of a rule → field of a FormatChoice and the types it may have.
_KEYS = {
    "format": ("format", str),
    "granularity": ("granularity", str),
    "block_size": ("block_size", int),
    "convrot": ("convrot", (bool, int, str)),
    "full_precision_matrix_mult": ("full_precision_matmul", bool),
}


@dataclass(frozen=True)
class FormatChoice:
    """A format for one layer, in the words of a :class:`~.recipe.Recipe`."""

    format: str
    granularity: str | None = None
    block_size: int | None = None
    convrot: bool | int | str | None = None
    full_precision_matmul: bool = False

    @property
    def options(self) -> dict[str, object]:
        """The fields as keyword arguments."""
        return dict(vars(self))


@dataclass(frozen=True)
class LayerRule:
    """What is to become of layers whose tensor's full name ``pattern`` finds: quantized in ``format``, or kept where that is None."""

    pattern: str
    format: FormatChoice | None
    origin: str

    @property
    def reason(self) -> str:
        """For people: "layer config img_mlp"."""
        return f"{self.origin} {self.pattern}"


def finding(
    rules: Iterable[LayerRule], names: Iterable[str], check: CancelCheck | None = None
) -> dict[str, list[LayerRule]]:
    """Name → the rules whose pattern finds it, in their order. One pattern after the other, so that only its own steps are remembered."""
    found: dict[str, list[LayerRule]] = {name: [] for name in names}
    for rule in rules:
        pattern = Pattern(rule.pattern)
        for name, its_rules in found.items():
            if check:
                check()
            if pattern.search(name):
                its_rules.append(rule)
    return found


def most_specific(found: Sequence[LayerRule], name: str) -> LayerRule | None:
    """Of rules that find ``name``: one that is the name of the layer itself, else that with the longest pattern.

    Of several as long one that keeps the layer, else the last.
    """
    layer = name.removesuffix(".weight")
    return max(
        reversed(found),
        key=lambda rule: (rule.pattern in (name, layer), len(rule.pattern), rule.format is None),
        default=None,
    )


def layer_rules(keep: Iterable[str], config: str) -> tuple[LayerRule, ...]:
    """Rules of keep patterns and of a layer config, see :func:`parse_layer_config`.

    Raises:
        RecipeError: the layer config is none, or a pattern cannot be followed, or all of them are too large together.
    """
    kept = tuple(LayerRule(pattern, None, "keep pattern") for pattern in keep)
    rules = (*kept, *parse_layer_config(config))
    left = _LARGEST
    for rule in rules:
        try:
            left -= Pattern(rule.pattern).size
        except RecipeError as error:
            raise RecipeError(f"The {rule.origin}: {error}") from None
        if left < 0:
            raise RecipeError(
                f"The {rule.origin}: all patterns have more than {_LARGEST:,} characters and repeats together; use fewer and plainer ones."
            )
    return rules


def parse_layer_config(text: str) -> tuple[LayerRule, ...]:
    """Rules in JSON: ``{"PATTERN": {"format": "int8", "convrot": true}, "PATTERN": "fp8", "PATTERN": "skip"}``.

    A pattern is a regular expression for names of tensors. Besides ``format`` a rule may have ``granularity``,
    ``block_size``, ``convrot`` and ``full_precision_matrix_mult``; ``{"skip": true}`` keeps layers as they are.

    Raises:
        RecipeError: text that is none of this.
    """
    if not text.strip():
        return ()
    try:
        entries = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RecipeError(f"The layer config is not valid JSON: {error}.") from None
    if not isinstance(entries, dict):
        raise RecipeError('The layer config must be a JSON object: {"PATTERN": {"format": "NAME"}}.')
    return tuple(LayerRule(pattern, _choice(pattern, value), "layer config") for pattern, value in entries.items())


def _choice(pattern: str, value: object) -> FormatChoice | None:
    if isinstance(value, str):
        value = {SKIP: True} if value == SKIP else {"format": value}
    if value == {SKIP: True}:
        return None
    if not isinstance(value, dict) or "format" not in value:
        raise RecipeError(f"The layer config says neither a format nor \"{SKIP}\" for '{pattern}'.")
    for key, entry in value.items():
        if key not in _KEYS:
            raise RecipeError(
                f"The layer config knows no '{key}', at '{pattern}'; it knows {', '.join([*_KEYS, SKIP])}."
            )
        kinds = _KEYS[key][1]
        if not isinstance(entry, kinds) or (kinds is int and isinstance(entry, bool)):
            raise RecipeError(f"The layer config's {key} cannot be {entry!r}, at '{pattern}'.")
    options = {_KEYS[key][0]: entry for key, entry in value.items()}
    name = SHORT.get(options["format"], options["format"])
    try:
        return FormatChoice(**{**options, "format": with_granularity(name, options.get("granularity"))})
    except RecipeError as error:
        raise RecipeError(f"The layer config, at '{pattern}': {error}") from None
