"""Text output: numbers, byte counts, Markdown tables, escaped control characters, bounded lengths, causes."""

import math
import re
from collections.abc import Iterable, Sequence

__all__ = [
    "bound_lines",
    "describe_cause",
    "escape_control",
    "human_bytes",
    "markdown_table",
    "mask_numbers",
    "shorten",
    "size_change",
    "three_digits",
]

_LONGEST = 2000  # characters of a line: a path of the longest kind fits twice
_LINES = 1000

_UNITS = ("B", "kB", "MB", "GB", "TB")


def human_bytes(count: float) -> str:
    """A byte count in decimal units with 3 significant digits: 19.2 MB."""
    power = 0
    while count >= 999.5 and power < len(_UNITS) - 1:
        count, power = count / 1000, power + 1
    return f"{count:.3g} {_UNITS[power]}"


def three_digits(value: float) -> str:
    """A number with 3 significant digits and no exponent from 0.0001 on: 0.0263, 12.3, 1230; "–" for NaN."""
    if math.isnan(value):
        return "–"
    text = f"{value:.3g}"
    return text if "e-" in text else f"{float(text):.15g}"


def size_change(before: float, after: float) -> str:
    """A size relative to that before: "46 % smaller"; empty without a size before."""
    change = round(100 * (after / before - 1)) if before else 0
    return f"{abs(change)} % {'larger' if change > 0 else 'smaller'}" if before else ""


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[object]], texts: int = 1) -> str:
    """A Markdown table; the first ``texts`` columns are left-aligned, the others, of numbers, right-aligned."""
    marks = [":--" if column < texts else "--:" for column in range(len(header))]
    lines = [header, marks, *([str(cell).replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def escape_control(text: str, allowed: str = "") -> str:
    """``text`` with characters that are not printable, such as control characters, escaped, except those of ``allowed``."""
    if text.isprintable():
        return text
    return "".join(
        char if char.isprintable() or char in allowed else char.encode("unicode_escape").decode() for char in text
    )


def shorten(text: str, longest: int = _LONGEST) -> str:
    """``text`` of at most ``longest`` characters; the middle of a longer one is left out."""
    if len(text) <= longest:
        return text
    half = (longest - 1) // 2
    return f"{text[:half]}…{text[-half:]}"


def describe_cause(error: BaseException) -> str:
    """The text of an exception of Python or a library, at most 300 characters; that of a KeyError is only the key."""
    text = f"{error} is missing" if isinstance(error, KeyError) else str(error)
    return text[:300] or type(error).__name__


def bound_lines(lines: Sequence[str], most: int = _LINES) -> str:
    """A text of at most ``most`` lines of bounded length, and the number of further ones."""
    further = [f"… {len(lines) - most:,} more lines"] if len(lines) > most else []
    return "\n".join([*map(shorten, lines[:most]), *further])


def mask_numbers(name: str) -> str:
    """The name of a layer or tensor with * for its numbers."""
    return re.sub(r"\b\d+\b", "*", name)
