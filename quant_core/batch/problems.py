"""Problems of a plan file, collected so that one pass finds all, and the check of its tables."""

import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..display import shorten
from ..errors import QuantizationError, RecipeError

__all__ = ["Problems", "show"]

_TYPES = {str: "a text in quotes", bool: "true or false", list: "a list", dict: "a table"}
_SHOWN = 100  # characters of a value in a message


def show(value: object) -> str:
    """A value of a plan in a message: text as it is, others as Python writes them, shortened."""
    return shorten(value if isinstance(value, str) else repr(value), _SHOWN)


class Problems:
    """The problems of the plan file at ``path``, in the order in which they were found."""

    def __init__(self, path: Path):
        self.path = path
        self._found: list[QuantizationError] = []

    def __len__(self) -> int:
        return len(self._found)

    def add(self, kind: type[QuantizationError], text: str, option: str | None = None) -> None:
        """Add a problem; ``text``: sentence without the name of the plan file, ``option``: key of the plan."""
        self._found.append(kind(f"{self.path}: {text}", file=str(self.path), option=option))

    def raise_first(self) -> None:
        """Raise the first problem, with the number of all, if there is one."""
        if not self._found:
            return
        first, count = self._found[0], len(self._found)
        if count == 1:
            raise first
        text = f"{str(first).rstrip('.')} (the first of {count} problems of the plan)."
        raise type(first)(text, file=first.file, option=first.option)

    def check_table(
        self, where: str, table: Mapping[str, Any], keys: Mapping[str, type], others: Iterable[str] = ()
    ) -> dict[str, Any]:
        """The known keys of a table whose values have the right type.

        Args:
            where: name of the table in messages.
            table: content of the table.
            keys: key → type of its value.
            others: further keys, whose values are checked elsewhere.
        """
        known, valid = [*keys, *others], {}
        for key, value in table.items():
            if key not in known:
                near = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
                hint = f"did you mean '{near[0]}'?" if near else f"choose one of {', '.join(sorted(known))}."
                self.add(RecipeError, f"unknown key '{show(key)}' in {where}: {hint}", key)
            elif key in keys and not isinstance(value, keys[key]):
                self.add(RecipeError, f"{key} in {where} must be {_TYPES[keys[key]]}, not {show(repr(value))}.", key)
            else:
                valid[key] = value
        return valid

    def check_name(self, what: str, name: str) -> None:
        """Add a problem if a name cannot be a part of a file name; ``what``: whose name it is."""
        if not name or set("/\\\0") & set(name):
            self.add(RecipeError, f"the name '{show(name)}' of {what} cannot be part of a file name; choose another.")
