"""Patterns find what Python's own find, and never take longer than the name is long."""

import random
import re
import warnings

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from learned_rounding.quant_core.errors import RecipeError
from learned_rounding.quant_core.recipes.patterns import Pattern

_ATOMS = st.sampled_from(
    [
        "a",
        "b",
        ".",
        r"\.",
        "0",
        r"\d",
        r"\w",
        r"\W",
        "[ab]",
        "[^a]",
        "[]a]",
        r"[\]0-9]",
        "^",
        "$",
        r"\b",
        r"\B",
        r"\A",
        r"\Z",
        "_",
        "{",
        r"\x61",
        r"\n",
    ]
)
PATTERNS = st.recursive(
    _ATOMS,
    lambda inner: st.one_of(
        st.lists(inner, min_size=1, max_size=4).map("".join),
        st.tuples(inner, inner).map("|".join),
        st.tuples(st.sampled_from(["(%s)", "(?:%s)"]), inner).map(lambda both: both[0] % both[1]),
        st.tuples(inner, st.sampled_from(["*", "+", "?", "*?", "{2}", "{1,2}", "{,2}", "{1,}"])).map(
            lambda both: "(" + both[0] + ")" + both[1]
        ),
    ),
    max_leaves=8,
)


@settings(derandomize=True, deadline=None, max_examples=1500)
@given(PATTERNS, st.lists(st.text("ab0._\n", max_size=7), max_size=4))
def test_it_finds_what_python_finds(text, names):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            expected = re.compile(text)
        except re.error:
            with pytest.raises(RecipeError):
                Pattern(text)
            return
    found = Pattern(text)
    for name in filter(None, names):  # of an empty one Python changes its mind about \B
        assert found.search(name) == bool(expected.search(name)), (text, name)


BOMBS = [
    r"(a+)+$",
    r"(a|a)*$",
    r"(a|aa)+b",
    r"(.*a){20}",
    r"(x+x+)+y",
    r".*.*.*.*.*=",
    r"((a*)*)*b",
    r"(?:a?){50}a{50}$",
]


@pytest.mark.parametrize("text", BOMBS)
def test_no_pattern_takes_longer_than_the_name(text, monkeypatch):
    """Steps are counted: each looks at every state once at most."""
    found, steps = Pattern(text), []
    real = found._step
    monkeypatch.setattr(found, "_step", lambda *key: steps.append(key) or real(*key))
    name = "a" * 5000 + "!"
    found.search(name)
    assert len(steps) <= len(name) + 1


@pytest.mark.parametrize(
    "text",
    [
        "(?=a)",
        "(?!a)b",
        "(?P<n>a)",
        "(?i)a",
        r"(a)\1",
        pytest.param("(" * 60 + ")" * 60, id="60 groups"),
        "(a{1000}){1000}",
        pytest.param("a" * 2001, id="2,001 characters"),
        "(",
        "[\\0-\uffff]",
        r"[a^\]\u0100-\uffff]",
        r"[]a-\U0010ffff]",
        "a{99999999999}",
    ],
)
def test_what_cannot_be_followed_is_refused(text, sentences):
    with sentences.raises(RecipeError):
        Pattern(text)


@pytest.mark.parametrize("text", ["x-\u5c42", "[\u5c42-]", "[\u5c42\u5757]", r"[\x00-\xff]", "[a-z]-\u5c42"])
def test_other_scripts_are_followed(text):
    assert Pattern(text).search("x-\u5c42") == bool(re.search(text, "x-\u5c42"))


def test_what_is_remembered_is_bounded_by_its_states():
    """Each letter leads to hundreds of states, and hardly ever to the same."""
    found = Pattern("[aeiou](?:.{61}){0,40}Q")
    draw = random.Random(0)
    for _ in range(10):
        found.search("".join(draw.choice("abcdefghi") for _ in range(200)))
    assert 0 < sum(len(states) for states in found._steps.values()) < 25_000


def test_what_is_remembered_is_bounded():
    found = Pattern("[^z]*z")
    for index in range(25_000):
        found.search(chr(0x4E00 + index))
    assert len(found._steps) <= 20_000
