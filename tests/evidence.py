"""The table of faults in DEVELOPMENT.md, written from what the tests of this run tried.

A test that injects a fault ends with `tried(fault, times, outcome)`; it is reached only when every try had that outcome.
`pytest … --thorough --faults-table` tries more often and writes the table.
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


def rewritten(document: str, tries: list[Try]) -> str:
    """`document` with the table between its two marks replaced."""
    before, rest = document.split(BEGIN)
    return before + BEGIN + table(tries) + END + rest.split(END)[1]
