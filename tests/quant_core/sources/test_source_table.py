"""Every kind of source × every format: what docs/sources.md says is what happens."""

from learned_rounding.tests.quant_core.sources.source_table import DOCUMENT, document


def test_the_table_of_sources_is_true():
    assert DOCUMENT.read_text(encoding="utf-8") == document()
