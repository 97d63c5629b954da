"""Regular expressions that are searched for in time linear in the name, whatever they say.

Workflows come from strangers, and Python's own search takes forever on some patterns. Here all ways through the pattern are followed
at once (Thompson 1968), and a step that was taken before is looked up. What cannot be followed so is refused: looking around,
references to groups, and flags.
"""

import re
import warnings
from collections.abc import Callable

from ..errors import RecipeError

__all__ = ["Pattern"]

_LONGEST = 2000  # characters of a pattern
_LARGEST = 5000  # states
_DEEPEST = 50  # groups in each other
_REMEMBERED = 20_000  # steps, and states in them
_WIDE = re.compile(
    r"\[\^?\]?(?:\\.|[^\]\\])*-(?:[^\0-\xff]|\\[uUN])", re.DOTALL
)  # a range that Python goes through letter by letter
_COUNT = re.compile(r"\{(\d*)(?:(,)(\d*))?\}")
_CLASS = re.compile(r"\[\^?\]?(?:\\.|[^\]\\])*\]", re.DOTALL)
_ESCAPE = re.compile(r"\\(?:x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|U[0-9a-fA-F]{8}|0[0-7]{0,2}|N\{[^}]*\}|.)", re.DOTALL)
_REPEATS = {"*": (0, None), "+": (1, None), "?": (0, 1)}
_INSIDE, _LAST_LINE_ENDS, _ENDS = range(3)
# What holds between two characters: (the one before is part of a word, so is the next, at the start, how near the end).
_PLACES: dict[str, Callable[[bool, bool, bool, int], bool]] = {
    "^": lambda before, after, start, end: start,
    r"\A": lambda before, after, start, end: start,
    "$": lambda before, after, start, end: end != _INSIDE,
    r"\Z": lambda before, after, start, end: end == _ENDS,
    r"\b": lambda before, after, start, end: before != after,
    r"\B": lambda before, after, start, end: before == after,
}


class Pattern:
    """A regular expression for names.

    Attributes:
        size: its characters, and the states that are followed.

    Raises:
        RecipeError: it is none, or one that is not followed here.
    """

    def __init__(self, text: str):
        if len(text) > _LONGEST:
            raise RecipeError(
                f"The pattern '{text[:40]}…' has {len(text):,} characters and may have {_LONGEST:,}; split it."
            )
        if _WIDE.search(text):
            raise RecipeError(
                f"The pattern '{text[:40]}' has a set with a range beyond \\xff; name its letters, or take a dot."
            )
        try:
            _test(text)
        except (re.error, RecursionError, OverflowError) as error:
            raise RecipeError(f"'{text}' is no regular expression: {error}.") from None
        self._text, self._at, self._depth = text, 0, 0
        self._states: list[tuple[Callable | None, list[int]]] = [(None, [])]  # the first is the end of all ways
        self._start = self._build(self._alternatives(), 0)
        self._steps: dict[tuple, frozenset[int] | None] = {}
        self._remembered = 0
        self.size = len(text) + len(self._states)

    def search(self, name: str) -> bool:
        """Whether it is found anywhere in ``name``."""
        states, before = frozenset(), None
        for index, char in enumerate((*name, None)):
            end = _ENDS if char is None else _LAST_LINE_ENDS if char == "\n" and index == len(name) - 1 else _INSIDE
            key = states, before, char, end
            if key not in self._steps:
                if self._remembered >= _REMEMBERED:
                    self._steps.clear()
                    self._remembered = 0
                self._steps[key] = self._step(*key)
                self._remembered += 1 + len(self._steps[key] or ())
            states = self._steps[key]
            if states is None:
                return True
            before = _is_word(char)
        return False

    def _step(self, states: frozenset[int], before: bool | None, char: str | None, end: int) -> frozenset[int] | None:
        """The states after ``char``; None where a way has ended."""
        place = bool(before), _is_word(char), before is None, end
        ahead, seen, todo = set(), set(), [self._start, *states]
        while todo:
            number = todo.pop()
            if number == 0:
                return None
            if number in seen:
                continue
            seen.add(number)
            test, following = self._states[number]
            if test is None or (test in _PLACES.values() and test(*place)):
                todo += following
            elif test not in _PLACES.values() and char is not None and test(char):
                ahead.update(following)
        return frozenset(ahead)

    def _refuse(self, what: str) -> RecipeError:
        return RecipeError(f"The pattern '{self._text}' {what}; use several plainer ones.")

    def _peek(self, text: str) -> bool:
        return self._text.startswith(text, self._at)

    def _take(self, expression: re.Pattern) -> re.Match | None:
        found = expression.match(self._text, self._at)
        if found:
            self._at = found.end()
        return found

    def _alternatives(self) -> tuple:
        ways = [self._sequence()]
        while self._peek("|"):
            self._at += 1
            ways.append(self._sequence())
        return "any", ways

    def _sequence(self) -> tuple:
        parts = []
        while self._at < len(self._text) and not self._peek("|") and not self._peek(")"):
            parts.append(self._repeated(self._one()))
        return "all", parts

    def _repeated(self, part: tuple) -> tuple:
        symbol = self._text[self._at : self._at + 1]
        if symbol in _REPEATS and symbol:
            self._at += 1
            least, most = _REPEATS[symbol]
        elif symbol == "{" and not self._peek("{}") and (count := self._take(_COUNT)):
            least = int(count[1] or 0)
            most = least if not count[2] else int(count[3]) if count[3] else None
        else:
            return part
        if self._peek("+"):
            raise self._refuse("repeats possessively")
        if self._peek("?"):  # as few as possible: found or not is the same
            self._at += 1
        return "repeat", part, least, most

    def _one(self) -> tuple:
        if self._peek("("):
            return self._group()
        if self._peek("["):
            return "char", _test(self._take(_CLASS)[0])
        if self._peek("\\"):
            escape = self._take(_ESCAPE)[0]
            if escape in _PLACES:
                return "char", _PLACES[escape]
            if escape[1] in "123456789":
                raise self._refuse("refers to a group")
            return "char", _test(escape)
        char = self._text[self._at]
        self._at += 1
        if char in _PLACES:
            return "char", _PLACES[char]
        return "char", "\n".__ne__ if char == "." else char.__eq__

    def _group(self) -> tuple:
        self._at += 3 if self._peek("(?:") else 1
        if self._peek("?"):
            raise self._refuse("looks around, names a group or sets a flag")
        self._depth += 1
        if self._depth > _DEEPEST:
            raise self._refuse(f"has more than {_DEEPEST} groups in each other")
        inside = self._alternatives()
        self._depth -= 1
        self._at += 1
        return inside

    def _state(self, test: Callable | None, following: list[int]) -> int:
        if len(self._states) >= _LARGEST:
            raise self._refuse("repeats too much")
        self._states.append((test, following))
        return len(self._states) - 1

    def _build(self, part: tuple, following: int) -> int:
        """The state at which ``part`` begins, on the way to ``following``."""
        kind, *rest = part
        if kind == "char":
            return self._state(rest[0], [following])
        if kind == "any":
            return self._state(None, [self._build(way, following) for way in rest[0]])
        if kind == "all":
            for one in reversed(rest[0]):
                following = self._build(one, following)
            return following
        inner, least, most = rest
        begin = following
        if most is None:
            begin = self._state(None, [following])
            self._states[begin][1].append(self._build(inner, begin))
        else:
            for _ in range(most - least):
                begin = self._state(None, [following, self._build(inner, begin)])
        for _ in range(least):
            begin = self._build(inner, begin)
        return begin


def _test(text: str) -> Callable:
    """Python's own expression for the whole of a text, without its warnings of what a set may mean one day."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return re.compile(text).fullmatch


def _is_word(char: str | None) -> bool:
    return char is not None and (char.isalnum() or char == "_")
