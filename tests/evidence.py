"""The table of faults in DEVELOPMENT.md, written from what the tests of this run tried.

A test that injects a fault ends with `tried(fault, times, outcome)`; it is reached only when every try had that outcome.
`pytest … --thorough --faults-table` tries more often and writes what it tried into the table: rows of what it did not try, as those of a GPU
on a machine without, stay as they are.
"""

from collections import Counter
from pathlib import Path

__all__ = ["DOCUMENT", "Try", "rows", "table", "rewritten"]

DOCUMENT = Path(__file__).parents[1] / "DEVELOPMENT.md"
BEGIN, END = "<!-- faults -->\n", "<!-- /faults -->\n"
HEAD = "| fault | on | tried | outcome |\n|---|---|---|---|\n"

Try = tuple[str, str, int, str]  # fault, on what, how often, outcome


def rows(tries: list[Try]) -> list[Try]:
    """One row for each fault and outcome on one thing, in the order of the first tries."""
    times = Counter()
    for fault, on, count, outcome in tries:
        times[fault, on, outcome] += count
    return [(fault, on, count, outcome) for (fault, on, outcome), count in times.items()]


def table(tries: list[Try]) -> str:
    return HEAD + "".join(f"| {fault} | {on} | {count:,} | {outcome} |\n" for fault, on, count, outcome in rows(tries))


def _read(text: str) -> list[Try]:
    """The rows of a table."""
    cells = [line.strip("|\n ").split(" | ") for line in text.removeprefix(HEAD).splitlines()]
    return [(fault, on, int(count.replace(",", "")), outcome) for fault, on, count, outcome in cells]


def rewritten(document: str, tries: list[Try]) -> str:
    """`document` with the rows between its two marks that `tries` are of replaced, and new ones added; the others stay."""
    before, rest = document.split(BEGIN)
    old, after = rest.split(END)
    made, merged = rows(tries), []
    for row in _read(old):
        again = [new for new in made if new[:2] == row[:2]]
        merged += [new for new in again or [row] if new not in merged]
    merged += [new for new in made if new not in merged]
    return before + BEGIN + table(merged) + END + after
