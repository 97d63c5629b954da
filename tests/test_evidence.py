"""The table of faults is written from what was tried, and nothing of it is lost by a run that tries less."""

from learned_rounding.tests.evidence import BEGIN, DOCUMENT, END, rewritten, table

BEFORE = [("a", "library", 5, "whole"), ("b", "a GPU", 7, "whole"), ("c", "library", 1, "none")]


def document(tries) -> str:
    return f"above\n{BEGIN}{table(tries)}{END}below\n"


def test_a_run_replaces_its_own_rows_and_adds_new_ones():
    tries = [("a", "library", 2, "whole"), ("a", "library", 1000, "whole"), ("d", "library", 1, "none"), ("b", "library", 3, "whole")]
    merged = [("a", "library", 1002, "whole"), *BEFORE[1:], ("d", "library", 1, "none"), ("b", "library", 3, "whole")]
    assert rewritten(document(BEFORE), tries) == document(merged)


def test_another_outcome_replaces_the_one_before():
    outcomes = [("a", "library", 3, "whole"), ("a", "library", 2, "none")]
    assert rewritten(document(BEFORE), outcomes) == document([*outcomes, *BEFORE[1:]])


def test_the_table_in_the_document_is_one():
    text = DOCUMENT.read_text(encoding="utf-8")
    assert rewritten(text, []) == text
