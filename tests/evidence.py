"""The table of faults in DEVELOPMENT.md, written from what the tests of this run tried.

A test that injects a fault ends with `tried(fault, times, outcome)`; it is reached only when every try had that outcome.
`pytest … --thorough --faults-table` tries more often and writes what it tried into the table: rows of what it did not try, as those of a GPU
on a machine without, stay as they are, as long as there is a test that tells of such a fault.
"""

import ast
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

__all__ = ["DOCUMENT", "Try", "faults", "parts", "read", "rewritten", "rows", "table"]

TESTS = Path(__file__).parent
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


def faults() -> list[re.Pattern]:
    """What the tests may call a fault: the texts that they hand to `tried`, with anything for what they fill in."""
    nodes = (
        node
        for path in sorted(TESTS.rglob("test_*.py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    )
    return [
        _pattern(node.args[0])
        for node in nodes
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "tried"
    ]


def _pattern(text: ast.expr) -> re.Pattern:
    parts = text.values if isinstance(text, ast.JoinedStr) else [text]
    return re.compile("".join(re.escape(part.value) if isinstance(part, ast.Constant) else ".+" for part in parts))


def read(text: str) -> list[Try]:
    """The rows of a table."""
    cells = [line.strip("|\n ").split(" | ") for line in text.removeprefix(HEAD).splitlines()]
    return [(fault, on, int(count.replace(",", "")), outcome) for fault, on, count, outcome in cells]


def parts(document: str) -> tuple[str, str, str]:
    """What stands before the table, the table, and what stands after it."""
    before, rest = document.split(BEGIN)
    return before, *rest.split(END)


def rewritten(document: str, tries: list[Try], known: Sequence[re.Pattern]) -> str:
    """`document` with the rows between its two marks that `tries` are of replaced, and new ones added.

    The others stay where their fault is one of `known`, and go where no test tells of it any more.
    """
    before, old, after = parts(document)
    made, merged = rows(tries), []
    for row in read(old):
        if not any(fault.fullmatch(row[0]) for fault in known):
            continue
        again = [new for new in made if new[:2] == row[:2]]
        merged += [new for new in again or [row] if new not in merged]
    merged += [new for new in made if new not in merged]
    return before + BEGIN + table(merged) + END + after
