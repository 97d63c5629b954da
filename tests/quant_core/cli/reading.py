"""What a command printed and wrote."""

import json
import re

from safetensors import safe_open

from learned_rounding.quant_core.recipes import PRESETS

ROW = {"format": "int8_tensorwise", "granularity": "row"}
INT8 = {**ROW, "convrot": "auto"}  # by default
# Presets of models whose every layer stays: with them there is nothing to quantize.
KEEP_ALL = {name for name, preset in PRESETS.items() if any(rule.text == ".*" for rule in preset.keep)}
UNUSED = "lrq: warning: No quantizable layer of model.safetensors matches "


def error_lines(text: str) -> list[str]:
    """Lines of standard error without those of a progress bar."""
    return [
        line for line in re.split(r"[\r\n]+", text) if line.strip() and not re.search(r"\d+%\|.*\| \d+/\d+ \[", line)
    ]


def recipe_of(path) -> dict:
    """The recipe in the header of a file."""
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["learned_rounding"])["recipe"]
