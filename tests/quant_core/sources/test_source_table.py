"""docs/sources.md against newly measured errors of every source in every format."""

import pytest

from learned_rounding.quant_core import FORMATS
from learned_rounding.tests.quant_core.sources.source_table import DOCUMENT, SOURCES, document


@pytest.fixture(scope="module")
def rows():
    """Cells of the lines of the table."""
    lines = DOCUMENT.read_text(encoding="utf-8").splitlines()
    return [line.strip("| ").split(" | ") for line in lines if line.startswith("| ")]


def test_document_has_a_row_for_each_source(rows):
    assert [row[0] for row in rows[2:]] == list(SOURCES)


def test_document_has_a_column_for_each_format(rows):
    assert rows[0][1:] == [f"`{name}`" for name in FORMATS]


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_document_matches_measured_errors():
    assert DOCUMENT.read_text(encoding="utf-8") == document()
