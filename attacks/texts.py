"""Hostile recipes and layer configs, from files and from workflows."""

import json
from collections.abc import Callable
from dataclasses import dataclass

from .attack import DEEP_JSON

__all__ = ["TEXTS", "TextAttack"]


@dataclass(frozen=True)
class TextAttack:
    """Hostile text.

    Attributes:
        entry_point: what reads it, see ``tests/fuzz/entry_points.py``.
        make: returns it.
        purpose: one line of README.md.
    """

    entry_point: str
    make: Callable[[], str]
    purpose: str


def _rules(count: int, pattern: str = "{}") -> str:
    return json.dumps({pattern.format(index): "skip" for index in range(count)})


TEXTS = {
    "toml_dotted_key": TextAttack(
        "recipe in TOML", lambda: "a." * 400_000 + "b = 1", "key of 400,000 parts, which takes quadratic time"
    ),
    "toml_quoted_key": TextAttack(
        "recipe in TOML", lambda: "[" + "'a\"' . " * 100_000 + "b]", "the same with quoted parts, as a table"
    ),
    "toml_inline_key": TextAttack(
        "recipe in TOML",
        lambda: 'x = {a = """\'"\'""", ' + "b." * 300_000 + "b = 1}",
        "the same after quotation marks that hide it",
    ),
    "toml_short_keys": TextAttack(
        "recipe in TOML", lambda: "".join(f"{'a.' * 62}b{index} = 1\n" for index in range(7_000)), "many long keys"
    ),
    "toml_tables": TextAttack("recipe in TOML", lambda: "[[a]]\n" * 160_000, "160,000 tables"),
    "toml_large": TextAttack("recipe in TOML", lambda: "#" * 100_000_000, "recipe of 100 MB"),
    "toml_backslashes": TextAttack(
        "recipe in TOML", lambda: '"' + "\\" * 999_998, "string of backslashes that does not end"
    ),
    "json_large": TextAttack("recipe in JSON", lambda: " " * 100_000_000, "the same in JSON"),
    "json_deep": TextAttack("recipe in JSON", DEEP_JSON.decode, "JSON nested 100,000 levels deep"),
    "json_patterns": TextAttack(
        "recipe in JSON", lambda: json.dumps({"keep": [""] * 200_000}), "200,000 empty keep patterns"
    ),
    "json_long_name": TextAttack(
        "recipe in JSON",
        lambda: json.dumps({"format": "float8_e4m3fn" * 70_000}),
        "format name of a million characters, for which a similar one is searched",
    ),
    "json_seed": TextAttack("recipe in JSON", lambda: '{"seed": 1' + "0" * 4_000 + "}", "seed of 4,000 digits"),
    "json_target": TextAttack(
        "recipe in JSON", lambda: '{"format": "measured", "target_size": NaN}', "target size of NaN"
    ),
    "config_rules": TextAttack("layer config", lambda: _rules(60_000), "60,000 short rules"),
    "config_alternatives": TextAttack(
        "layer config",
        lambda: _rules(110, "a|" * 900 + "{}"),
        "rules of 900 alternatives each, which take long to compile",
    ),
    "config_long_pattern": TextAttack(
        "layer config", lambda: json.dumps({"a" * 900_000: "skip"}), "pattern of 900,000 characters"
    ),
    "config_long_format": TextAttack(
        "layer config", lambda: json.dumps({"a": "int8" * 200_000}), "format name of 800,000 characters"
    ),
    "config_large": TextAttack("layer config", lambda: "[" * 100_000_000, "layer config of 100 MB"),
}
