"""Regular expressions of users, searched for in tensor names within a limited time.

Workflows come from strangers, and a backtracking search can take exponential time. The package ``regex`` ends a search
after a timeout, but it expands counted repeats while it compiles and stores every level of a recursion: counts are
limited, recursion is refused. The number of searches is limited too, so that a plan takes seconds at most.
"""

import re
import time
from collections.abc import Iterable, Iterator, Sequence

import regex

from ..cancellation import CancelCheck
from ..display import shorten
from ..errors import RecipeError

__all__ = ["LARGEST", "Pattern", "SearchBudget"]

LARGEST = 200_000  # characters × counts of repeats, of all patterns together; two thousand layer names have as many
_LONGEST = 2000  # characters of one pattern
_SHOWN = 80  # characters of a pattern in an error message
_LONG_LITERAL = 200  # characters
_SECONDS = 1.5  # CPU time of all searches of a plan, beyond the usual time of each
_USUAL_SECONDS = {True: 5e-6, False: 2e-6}  # of one search, with backtracking and without
_ALL_USUAL_SECONDS = 8.5  # of all searches of a plan: bounds their number
_BATCH = {True: 1, False: 256}  # searches whose time is measured together: those without backtracking take linear time
_COUNT = re.compile(r"\{(\d*),?(\d*)\}")
_BACKTRACKING = frozenset("*+?{|(")  # a pattern without these takes linear time
_REFUSED = (
    (re.compile(r"(?<!\\)\(\?(?:R|&|P>|[+-]?\d)"), "recursion"),
    (re.compile(r"(?<!\\)\(\?[a-zA-Z-]*x"), "the verbose flag"),  # counts could hold comments
)


class Pattern:
    """A regular expression for tensor names, in the syntax of the package ``regex``.

    Attributes:
        text: the expression; ``shown``: the same for messages.
        size: its characters times the counts of its repeats.

    Raises:
        RecipeError: the expression is not valid, too large, or uses what is refused.
    """

    def __init__(self, text: str):
        self.text = text
        self.shown = shown = shorten(text, _SHOWN)
        if len(text) > _LONGEST:
            raise RecipeError(f"The pattern '{shown}' has {len(text):,} characters, more than {_LONGEST:,}; split it.")
        for mark, feature in _REFUSED:
            if mark.search(text):
                raise RecipeError(f"The pattern '{shown}' uses {feature}, which is not supported; write it without.")
        self.size = len(text)
        for counts in _COUNT.findall(text):
            self.size *= max(1, *(int(count[:9] or 0) for count in counts))
        if self.size > LARGEST:
            raise RecipeError(f"The pattern '{shown}' repeats more than {LARGEST:,} characters; use smaller counts.")
        try:
            self._compiled = regex.compile(text)
            if len(text) > _LONG_LITERAL:
                # A search for a literal builds tables in time cubic in its length, which no timeout ends; a look-ahead does not.
                self._compiled = regex.compile(f"(?={text})")
        except (regex.error, RecursionError, OverflowError, ValueError) as error:
            raise RecipeError(f"'{shown}' is not a valid regular expression: {error}.") from None
        self.backtracks = not _BACKTRACKING.isdisjoint(text)

    def search(self, name: str, timeout: float | None = None) -> bool:
        """Whether the pattern is found anywhere in ``name``.

        Raises:
            TimeoutError: the search took more than ``timeout`` seconds of CPU time.
        """
        return bool(self.find([name], timeout))

    def find(self, names: Iterable[str], timeout: float | None = None) -> list[str]:
        """The names in which the pattern is found; ``timeout`` is that of each search, see :meth:`search`."""
        search = self._compiled.search
        return [name for name in names if search(name, timeout=timeout)]


class SearchBudget:
    """Time that all searches of a plan share: a fixed usual time per search, and measured CPU time beyond it."""

    def __init__(self, seconds: float = _SECONDS):
        self._left, self._usual_left = seconds, _ALL_USUAL_SECONDS

    def find(self, pattern: Pattern, names: Sequence[str], check: CancelCheck | None = None) -> Iterator[str]:
        """Yield the names in which the pattern is found.

        Raises:
            RecipeError: the time is over.
        """
        size = _BATCH[pattern.backtracks]
        for begin in range(0, len(names), size):
            if check:
                check()
            yield from self._search(pattern, names[begin : begin + size])

    def _search(self, pattern: Pattern, names: Sequence[str]) -> list[str]:
        usual = len(names) * _USUAL_SECONDS[pattern.backtracks]
        self._usual_left -= usual
        if self._usual_left < 0:
            raise RecipeError(
                f"The layer rules up to '{pattern.shown}' are too many for a model of so many layers; use fewer rules, each for "
                "more layers."
            )
        start = time.thread_time()
        try:
            found = pattern.find(names, max(self._left, usual))
        except (TimeoutError, MemoryError):
            self._left, found = 0.0, []
        self._left -= max(0.0, time.thread_time() - start - usual)
        if self._left <= 0:
            raise RecipeError(f"The pattern '{pattern.shown}' takes too long to search for; write a simpler one.")
        return found
