"""Tests of the fault table: a run replaces only its own rows, and every row belongs to a fault that a test can report."""

import re

import pytest

from learned_rounding.tests.evidence import (
    BEGIN,
    DOCUMENT,
    END,
    collect_fault_patterns,
    format_table,
    parse_table,
    split_document,
    update_document,
)

BEFORE = [("a", "library", 5, "whole"), ("b", "a GPU", 7, "whole"), ("c", "library", 1, "none")]
KNOWN = [re.compile("[a-d]")]


def make_document(tries) -> str:
    return f"above\n{BEGIN}{format_table(tries)}{END}below\n"


def test_update_replaces_rows_of_the_run_and_appends_new_ones():
    tries = [
        ("a", "library", 2, "whole"),
        ("a", "library", 1000, "whole"),
        ("d", "library", 1, "none"),
        ("b", "library", 3, "whole"),
    ]
    merged = [("a", "library", 1002, "whole"), *BEFORE[1:], ("d", "library", 1, "none"), ("b", "library", 3, "whole")]
    assert update_document(make_document(BEFORE), tries, KNOWN) == make_document(merged)


def test_update_replaces_a_row_by_all_outcomes_of_the_run():
    outcomes = [("a", "library", 3, "whole"), ("a", "library", 2, "none")]
    assert update_document(make_document(BEFORE), outcomes, KNOWN) == make_document([*outcomes, *BEFORE[1:]])


def test_update_removes_rows_that_no_test_can_report():
    known = [re.compile("a"), re.compile("c")]
    assert update_document(make_document(BEFORE), [], known) == make_document([BEFORE[0], BEFORE[2]])


@pytest.fixture(scope="module")
def known():
    """Patterns of the faults of today's tests."""
    return collect_fault_patterns()


def test_fault_patterns_contain_literal_text(known):
    """A pattern of placeholders alone would match every fault."""
    assert len(known) > 50
    assert not any(fault.fullmatch("something else") for fault in known)


def test_every_row_of_the_document_has_a_test(known):
    rows = parse_table(split_document(DOCUMENT.read_text(encoding="utf-8"))[1])
    assert [row[0] for row in rows if not any(fault.fullmatch(row[0]) for fault in known)] == []


def test_update_without_tries_keeps_the_document(known):
    text = DOCUMENT.read_text(encoding="utf-8")
    assert update_document(text, [], known) == text
