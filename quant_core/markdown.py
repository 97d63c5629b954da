"""Tables for people, in markdown."""

from collections.abc import Iterable, Sequence

__all__ = ["markdown_table"]


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table, its first column to the left and the others to the right."""
    marks = [":--", *["--:"] * (len(header) - 1)]
    lines = [header, marks, *([str(cell).replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
