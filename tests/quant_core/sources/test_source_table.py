"""docs/sources.md against newly measured errors of every source in every format."""

from learned_rounding.tests.quant_core.sources.source_table import DOCUMENT, document


def test_document_matches_measured_errors():
    assert DOCUMENT.read_text(encoding="utf-8") == document()
