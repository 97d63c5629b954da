"""The table of faults is written from what was tried: a run that tries less loses nothing of it, and nothing stays that no test tries."""

import re

from learned_rounding.tests.evidence import BEGIN, DOCUMENT, END, faults, parts, read, rewritten, table

BEFORE = [("a", "library", 5, "whole"), ("b", "a GPU", 7, "whole"), ("c", "library", 1, "none")]
KNOWN = [re.compile("[a-d]")]


def document(tries) -> str:
    return f"above\n{BEGIN}{table(tries)}{END}below\n"


def test_a_run_replaces_its_own_rows_and_adds_new_ones():
    tries = [
        ("a", "library", 2, "whole"),
        ("a", "library", 1000, "whole"),
        ("d", "library", 1, "none"),
        ("b", "library", 3, "whole"),
    ]
    merged = [("a", "library", 1002, "whole"), *BEFORE[1:], ("d", "library", 1, "none"), ("b", "library", 3, "whole")]
    assert rewritten(document(BEFORE), tries, KNOWN) == document(merged)


def test_another_outcome_replaces_the_one_before():
    outcomes = [("a", "library", 3, "whole"), ("a", "library", 2, "none")]
    assert rewritten(document(BEFORE), outcomes, KNOWN) == document([*outcomes, *BEFORE[1:]])


def test_a_row_goes_with_the_test_that_made_it():
    assert rewritten(document(BEFORE), [], [re.compile("a"), re.compile("c")]) == document([BEFORE[0], BEFORE[2]])


def test_what_the_tests_call_a_fault_is_a_text():
    """With placeholders perhaps, but not one alone, which would be any fault."""
    known = faults()
    assert len(known) > 50 and not any(fault.fullmatch("something else") for fault in known)


def test_the_table_in_the_document_is_one_and_each_of_its_rows_has_a_test():
    text, known = DOCUMENT.read_text(encoding="utf-8"), faults()
    assert [row[0] for row in read(parts(text)[1]) if not any(fault.fullmatch(row[0]) for fault in known)] == []
    assert rewritten(text, [], known) == text
