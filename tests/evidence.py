"""Fault table of docs/reliability.md, written from the faults that the tests of a run injected.

A test that injects a fault calls the fixture ``tried(fault, count, outcome)`` at its end, so it reports an outcome only if every
try had it. ``pytest … --thorough --faults-table`` tries each fault more often and rewrites the rows of the faults that it tried.
Other rows stay, for example those of a GPU on a machine without one, while some test can still report their fault.
"""

import ast
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

__all__ = [
    "DOCUMENT",
    "Try",
    "collect_fault_patterns",
    "format_table",
    "merge_tries",
    "parse_table",
    "split_document",
    "update_document",
]

TESTS = Path(__file__).parent
DOCUMENT = TESTS.parent / "docs" / "reliability.md"
BEGIN, END = "<!-- faults -->\n", "<!-- /faults -->\n"
HEAD = "| fault | on | tried | outcome |\n|---|---|---|---|\n"

Try = tuple[str, str, int, str]  # fault, device or host, number of tries, outcome


def merge_tries(tries: Sequence[Try]) -> list[Try]:
    """One row per fault, device and outcome, in the order of the first tries."""
    counts: Counter[tuple[str, str, str]] = Counter()
    for fault, on, count, outcome in tries:
        counts[fault, on, outcome] += count
    return [(fault, on, count, outcome) for (fault, on, outcome), count in counts.items()]


def format_table(tries: Sequence[Try]) -> str:
    """The Markdown table of the merged tries."""
    return HEAD + "".join(
        f"| {fault} | {on} | {count:,} | {outcome} |\n" for fault, on, count, outcome in merge_tries(tries)
    )


def collect_fault_patterns() -> list[re.Pattern]:
    """Patterns of all fault names that tests pass to ``tried``; ``.+`` replaces the placeholders of f-strings."""
    nodes = (
        node
        for path in sorted(TESTS.rglob("test_*.py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    )
    return [
        _compile_fault(node.args[0])
        for node in nodes
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "tried"
    ]


def _compile_fault(text: ast.expr) -> re.Pattern:
    parts = text.values if isinstance(text, ast.JoinedStr) else [text]
    return re.compile("".join(re.escape(str(part.value)) if isinstance(part, ast.Constant) else ".+" for part in parts))


def parse_table(text: str) -> list[Try]:
    """The rows of a Markdown table of :func:`format_table`."""
    cells = [line.strip("|\n ").split(" | ") for line in text.removeprefix(HEAD).splitlines()]
    return [(fault, on, int(count.replace(",", "")), outcome) for fault, on, count, outcome in cells]


def split_document(document: str) -> tuple[str, str, str]:
    """The text before the table, the table, and the text after it, without the two marks."""
    before, rest = document.split(BEGIN)
    table, after = rest.split(END)
    return before, table, after


def update_document(document: str, tries: Sequence[Try], known: Sequence[re.Pattern]) -> str:
    """``document`` with the rows of ``tries`` replaced or added between the two marks.

    Args:
        document: text with a table of :func:`format_table` between the marks.
        tries: results of a run.
        known: patterns of :func:`collect_fault_patterns`; rows of other faults are removed.
    """
    before, table, after = split_document(document)
    new, merged = merge_tries(tries), []
    for row in parse_table(table):
        if not any(fault.fullmatch(row[0]) for fault in known):
            continue
        replacements = [other for other in new if other[:2] == row[:2]]
        merged += [other for other in replacements or [row] if other not in merged]
    merged += [row for row in new if row not in merged]
    return before + BEGIN + format_table(merged) + END + after
