"""Patterns find what Python's own find, with look-around, flags and groups; hostile ones end within the budget."""

import re
import time
import warnings

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from learned_rounding.quant_core.errors import RecipeError
from learned_rounding.quant_core.recipes import patterns
from learned_rounding.quant_core.recipes.layers import find_rules, parse_rules
from learned_rounding.quant_core.recipes.patterns import Pattern, SearchBudget

_ATOMS = st.sampled_from(
    [*"ab.0^$_{", r"\.", r"\d", r"\w", r"\W", "[ab]", "[^a]", "[]a]", r"[\]0-9]", r"\b", r"\B", r"\A", r"\Z", r"\x61"]
)
PATTERNS = st.recursive(
    _ATOMS,
    lambda inner: st.one_of(
        st.lists(inner, min_size=1, max_size=4).map("".join),
        st.tuples(inner, inner).map("|".join),
        st.tuples(st.sampled_from(["(%s)", "(?:%s)", "(?=%s)", "(?!%s)", "(?i:%s)"]), inner).map(
            lambda both: both[0] % both[1]
        ),
        st.tuples(inner, st.sampled_from(["*", "+", "?", "*?", "{2}", "{1,2}", "{1,}"])).map(
            lambda both: "(" + both[0] + ")" + both[1]
        ),
    ),
    max_leaves=8,
)
NAME = "a" * 2000 + "!"


NAMES = st.lists(st.text("ab0._\n", max_size=7), max_size=4)


def check_same_as_python(text: str, names: list[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            expected = re.compile(text)
        except re.error:
            return  # the package accepts more
    found = Pattern(text)
    for name in filter(None, names):  # \B of an empty name differs between versions of Python
        assert found.search(name) == bool(expected.search(name)), (text, name)


@settings(derandomize=True, deadline=None, max_examples=100)
@given(PATTERNS, NAMES)
def test_it_finds_what_python_finds(text, names):
    check_same_as_python(text, names)


@pytest.mark.soak
@settings(derandomize=True, deadline=None, max_examples=1000)
@given(PATTERNS, NAMES)
def test_it_finds_what_python_finds_in_many_patterns(text, names):
    check_same_as_python(text, names)


def test_look_around_flags_and_groups_work(subtests):
    for text, name, found in [
        ("img(?=_mlp)", "blocks.0.img_mlp", True),
        ("^(?!.*mlp)", "blocks.0.img_mlp", False),
        (r"(?<!double_)blocks\.0", "double_blocks.0", False),
        ("(?i)QKV", "blocks.0.qkv", True),
        (r"(?P<block>\d)\.(?P=block)", "blocks.3.3", True),
        (r"(.)\1", "abc", False),
        ("x-\u5c42", "x-\u5c42", True),
        ("[\u4e00-\u9fff]", "\u5c42", True),
        ("a" * 1990 + "b?", NAME, True),
    ]:
        with subtests.test(text[:40]):
            assert Pattern(text).search(name) is found


REFUSED = {
    "recursion": "(?R)",
    "recursion of a group": "(?P<x>a(?P>x))",
    "verbose flag": "(?x)a{9 9}",
    "repeats of repeats": "(a{1000}){1000}",
    "large count": "a{99999999999}",
    "deep repeats": "(((a{99}){99}){99}){99}",
    "long": "a" * 2001,
    "open group": "(",
    "unbalanced": "a)(b" + "c" * 300,
    "named list": r"\L<x>",
    "groups": "(" * 900 + ")" * 900,
}


def test_large_and_invalid_patterns_are_refused(subtests, sentences):
    for kind, text in REFUSED.items():
        with subtests.test(kind), sentences.raises(RecipeError):
            Pattern(text)


BOMBS = [r"(a+)+$", r"(a|a)*$", r"(a|aa)+b$", r"(?=(a+)+b)", r"(?:a?){50}a{50}$", r"(a{4800}[b1])"]
BOMB_NAMES = [f"{index}.{NAME}" for index in range(50)]


def test_hostile_patterns_end_within_the_budget_for_all_names_together(subtests):
    for text in BOMBS:
        with subtests.test(text):
            start = time.process_time()
            try:
                list(SearchBudget(0.05).find(Pattern(text), BOMB_NAMES))
            except RecipeError as error:
                assert "takes too long" in str(error)
                assert text in str(error)
            assert time.process_time() - start < 0.5


@pytest.mark.soak
def test_a_hostile_rule_ends_within_two_seconds(subtests):
    for text in BOMBS:
        with subtests.test(text=text):
            start = time.process_time()
            try:
                find_rules(parse_rules([text], ""), BOMB_NAMES)
            except RecipeError as error:
                assert "takes too long" in str(error)
            assert time.process_time() - start < 2


def test_the_budget_is_shared_by_all_names_and_patterns(sentences):
    """Each search alone is short; together they are not."""
    budget, pattern = SearchBudget(0.05), Pattern("(a|aa)+$")
    with sentences.raises(RecipeError):
        list(budget.find(pattern, ["a" * 20 + "!" + str(length) for length in range(100_000)]))


def test_usual_patterns_leave_the_budget_untouched():
    names = [f"model.double_blocks.{index}.img_attn.qkv.weight" for index in range(100)]
    budget = SearchBudget(0.05)
    found = [
        name
        for index in range(100)
        for name in budget.find(Pattern(rf"^model\.double_blocks\.{index}\.(img|txt)_attn"), names)
    ]
    assert found == names


@pytest.mark.parametrize("text", ["a.*b", "a[b]"], ids=["backtracking", "linear"])
def test_number_of_searches_is_bounded(monkeypatch, sentences, text):
    """No time is measured: a plan of many rules and many layers is refused wherever it is made."""
    monkeypatch.setattr(patterns.time, "thread_time", lambda: 0.0)
    monkeypatch.setattr(patterns, "_ALL_USUAL_SECONDS", patterns._ALL_USUAL_SECONDS / 20)
    most = round(patterns._ALL_USUAL_SECONDS / patterns._USUAL_SECONDS[Pattern(text).backtracks])
    names, budget = ["x"] * 1000, SearchBudget()
    monkeypatch.setattr(Pattern, "find", lambda self, names, timeout=None: [])
    for _ in range(most // 1000 - 1):
        assert list(budget.find(Pattern(text), names)) == []
    with sentences.raises(RecipeError):
        for _ in range(3):
            list(budget.find(Pattern(text), names))


def test_two_thousand_layers_may_have_a_rule_each():
    usual = patterns._USUAL_SECONDS[Pattern("blocks.0.attn").backtracks]
    assert 2000 * 2000 * usual < patterns._ALL_USUAL_SECONDS


def test_a_search_can_be_cancelled(subtests):
    """Before each search that may take long, and before each 256 of those that do not."""
    for text, checks in [("a[b]", 4), ("a.*b", 1000)]:
        with subtests.test(text=text, checks=checks):
            calls = []
            list(SearchBudget().find(Pattern(text), ["x"] * 1000, lambda calls=calls: calls.append(1)))
            assert len(calls) == checks
