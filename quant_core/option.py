"""One option of a recipe: the source of its node widget, its ``lrq`` option and its row in the manual."""

from dataclasses import dataclass

from .errors import RecipeError, UnknownNameError

__all__ = ["Option"]


@dataclass(frozen=True, kw_only=True)
class Option:
    """Type, default, range and help of an option.

    Attributes:
        help: noun phrase or imperative, without a full stop.
        kind: type of the value.
        default: value that holds if the option is not given; None: the help says what holds.
        choices: allowed strings; empty: any.
        low, high: smallest and largest allowed number.
        flags: option strings of ``lrq``; empty: ``--NAME``.
        metavar: name of the value in the help of ``lrq``.
    """

    help: str
    kind: type = str
    default: object = None
    choices: tuple[str, ...] = ()
    low: float = 0
    high: float = float("inf")
    flags: tuple[str, ...] = ()
    metavar: str | None = None

    @property
    def scope(self) -> str:
        """Formats or rounding methods that the option applies to; empty for all."""
        return ""

    @property
    def details(self) -> str:
        """Choices that the help does not explain, range and default: "1 to 1,000,000; default: 500"."""
        explained = all(choice in self.help for choice in self.choices)
        bounded = self.kind in (int, float) and self.high < float("inf")
        limits = f"{_format(self.low)} to {_format(self.high)}" if bounded else ""
        default = f"default: {self.default}" if self.default not in (None, False, "") else ""
        return "; ".join(filter(None, ("" if explained else ", ".join(self.choices), limits, default)))

    def describe(self, details: bool = True) -> str:
        """Help, scope and, with ``details``, range and default in one line without a full stop."""
        notes = "; ".join(filter(None, (self.scope and f"for {self.scope}", self.details if details else "")))
        return f"{self.help} ({notes})" if notes else self.help

    def check(self, name: str, value: object) -> None:
        """Refuse a value of another type, an unknown choice or a number out of range.

        Raises:
            RecipeError: names the option and the value.
        """
        kinds = (int, float) if self.kind is float else (self.kind,)
        if not isinstance(value, kinds) or (isinstance(value, bool) and self.kind is not bool):
            raise RecipeError(f"{name} cannot be {value!r}.")
        if isinstance(value, str) and self.choices and value not in self.choices:
            raise UnknownNameError(name, value, self.choices)
        if isinstance(value, (int, float)) and not self.low <= value <= self.high:
            raise RecipeError(f"{name} must be between {self.low:g} and {self.high:g}, not {value}.")


def _format(number: float) -> str:
    return f"{number:,}" if isinstance(number, int) else f"{number:g}"
