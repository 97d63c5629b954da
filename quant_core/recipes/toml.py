"""The TOML reader of the standard library, or its twin on Python 3.10, for texts of untrusted sources."""

import re
import sys
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = ["parse_bounded_toml", "tomllib"]

_PARTS = 64  # of a dotted key: the time for a key is quadratic in their number
_PART = r"""(?:[\w-]+|"(?:[^"\\\n]|\\.)*"|'[^'\n]*')[ \t]*\.[ \t]*"""
_LONG_KEY = re.compile(rf"(?<![\w-])(?:{_PART}){{{_PARTS}}}")


def parse_bounded_toml(text: str) -> dict[str, Any]:
    """Parse TOML. Raises ValueError if it is not valid or has a key of many parts."""
    if _LONG_KEY.search(text):
        raise ValueError(f"a key of {_PARTS} parts or more")
    return tomllib.loads(text)
