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


@settings(derandomize=True, deadline=None, max_examples=500)
@given(PATTERNS, st.lists(st.text("ab0._\n", max_size=7), max_size=4))
def test_it_finds_what_python_finds(text, names):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            expected = re.compile(text)
        except re.error:
            return  # the package accepts more
    found = Pattern(text)
    for name in filter(None, names):  # \B of an empty name differs between versions of Python
        assert found.search(name) == bool(expected.search(name)), (text, name)


@pytest.mark.parametrize(
    "text, name, found",
    [
        ("img(?=_mlp)", "blocks.0.img_mlp", True),
        ("^(?!.*mlp)", "blocks.0.img_mlp", False),
        (r"(?<!double_)blocks\.0", "double_blocks.0", False),
        ("(?i)QKV", "blocks.0.qkv", True),
        (r"(?P<block>\d)\.(?P=block)", "blocks.3.3", True),
        (r"(.)\1", "abc", False),
        ("x-\u5c42", "x-\u5c42", True),
        ("[\u4e00-\u9fff]", "\u5c42", True),
        ("a" * 1990 + "b?", NAME, True),
    ],
)
def test_look_around_flags_and_groups_work(text, name, found):
    assert Pattern(text).search(name) is found


@pytest.mark.parametrize(
    "text",
    [
        "(?R)",
        "(?P<x>a(?P>x))",
        "(?x)a{9 9}",
        "(a{1000}){1000}",
        "a{99999999999}",
        "(((a{99}){99}){99}){99}",
        pytest.param("a" * 2001, id="long"),
        "(",
        pytest.param("a)(b" + "c" * 300, id="unbalanced"),
        r"\L<x>",
        pytest.param("(" * 900 + ")" * 900, id="groups"),
    ],
)
def test_large_and_invalid_patterns_are_refused(text, sentences):
    with sentences.raises(RecipeError):
        Pattern(text)


BOMBS = [r"(a+)+$", r"(a|a)*$", r"(a|aa)+b$", r"(?=(a+)+b)", r"(?:a?){50}a{50}$", r"(a{4800}[b1])"]


@pytest.mark.parametrize("text", BOMBS)
def test_a_hostile_pattern_ends_within_two_seconds_for_all_names_together(text):
    names, start = [f"{index}.{NAME}" for index in range(50)], time.process_time()
    try:
        find_rules(parse_rules([text], ""), names)
    except RecipeError as error:
        assert "takes too long" in str(error) and text in str(error)
    assert time.process_time() - start < 2


def test_the_budget_is_shared_by_all_names_and_patterns(sentences):
    """Each search alone is short; together they are not."""
    budget, pattern = SearchBudget(0.05), Pattern("(a|aa)+$")
    with sentences.raises(RecipeError):
        list(budget.find(pattern, ["a" * 20 + "!" + str(length) for length in range(100_000)]))


def test_usual_patterns_leave_the_budget_untouched(monkeypatch):
    monkeypatch.setattr(patterns, "_SECONDS", 0.05)
    names = [f"model.double_blocks.{index}.img_attn.qkv.weight" for index in range(200)]
    rules = parse_rules([rf"^model\.double_blocks\.{index}\.(img|txt)_attn" for index in range(200)], "")
    assert all(len(found) == 1 for found in find_rules(rules, names).values())


@pytest.mark.parametrize("text", ["a.*b", "a[b]"], ids=["backtracking", "linear"])
def test_number_of_searches_is_bounded(monkeypatch, sentences, text):
    """No time is measured: a plan of many rules and many layers is refused wherever it is made."""
    monkeypatch.setattr(patterns.time, "thread_time", lambda: 0.0)
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


def test_many_short_patterns_are_refused(sentences):
    with sentences.raises(RecipeError):
        parse_rules([str(index) for index in range(patterns.LARGEST)], "")


def test_search_can_be_cancelled():
    checks = []
    list(SearchBudget().find(Pattern("a[b]"), ["x"] * 1000, lambda: checks.append(1)))
    list(SearchBudget().find(Pattern("a.*b"), ["x"] * 10, lambda: checks.append(1)))
    assert len(checks) == 4 + 10
