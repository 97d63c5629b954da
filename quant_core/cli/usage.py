"""Argument parser whose errors are one line each: they name what is wrong, and the closest known name."""

import argparse
import difflib
import sys
from collections.abc import Callable
from typing import NoReturn

from ..display import escape_control
from ..errors import UnknownNameError

__all__ = ["Parser"]

_NEAR = 0.7  # similarity from which on an option is suggested


class HelpFormatter(argparse.HelpFormatter):
    """Shows the value of an option once, as Python 3.13 does: ``-o, --output PATH``."""

    def _format_action_invocation(self, action):
        if not action.option_strings or action.nargs == 0:
            return super()._format_action_invocation(action)
        value = self._format_args(action, self._get_default_metavar_for_optional(action))
        return f"{', '.join(action.option_strings)} {value}"


class Parser(argparse.ArgumentParser):
    """Accepts options with dashes or underscores, refuses abbreviations, and reports wrong usage in one line.

    Args:
        check: called with the parser of a command and its parsed arguments; may report an error.
    """

    def __init__(self, *args, check: Callable[["Parser", argparse.Namespace], None] | None = None, **kwargs):
        super().__init__(*args, allow_abbrev=False, formatter_class=HelpFormatter, **kwargs)
        self._check = check

    def parse_args(self, args=None, namespace=None):  # pyright: ignore[reportIncompatibleMethodOverride]
        parsed, unknown = self.parse_known_args(args, namespace)
        parser = self._find_command(parsed.command)
        if unknown:
            parser.error(f"unrecognized arguments: {' '.join(unknown)}{parser._suggest_option(unknown)}")
        if parser._check:
            parser._check(parser, parsed)
        return parsed

    def _find_command(self, name: str) -> "Parser":
        commands = (action for action in self._actions if isinstance(action, argparse._SubParsersAction))
        return next(commands).choices[name]

    def _suggest_option(self, unknown: list[str]) -> str:
        """A hint at an option that is named like the first unknown one; empty without one."""
        given = next((word.partition("=")[0] for word in unknown if word.startswith("--")), None)
        shown = (option for option, action in self._option_string_actions.items() if action.help != argparse.SUPPRESS)
        near = difflib.get_close_matches(given, [*shown], n=1, cutoff=_NEAR) if given else ()
        return f"; did you mean {near[0]}?" if near else ""

    def _check_value(self, action, value):
        if action.choices is not None and value not in action.choices:
            name = action.option_strings[-1] if action.option_strings else str(action.metavar or action.dest).lower()
            raise argparse.ArgumentError(None, str(UnknownNameError(name, value, action.choices)))

    def error(self, message) -> NoReturn:
        self.exit(2, escape_control(f"{self.prog}: error: {message} (see {self.prog} --help)") + "\n")

    def parse_known_args(self, args=None, namespace=None):  # pyright: ignore[reportIncompatibleMethodOverride]
        spellings = {option.replace("_", "-"): option for option in self._option_string_actions}

        def normalize(word: str) -> str:
            option, equals, value = word.partition("=")
            return spellings.get(option.replace("_", "-"), option) + equals + value if word.startswith("--") else word

        words = sys.argv[1:] if args is None else args
        return super().parse_known_args([normalize(word) for word in words], namespace)

    def _print_message(self, message, file=None):
        super()._print_message(escape_control(message, allowed="\n"), file)
