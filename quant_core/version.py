"""The release this code belongs to; part of every fingerprint. It is stated in pyproject.toml alone, which pip installs with the package."""

import re
from pathlib import Path

__all__ = ["VERSION"]


def _read_version() -> str:
    # No TOML reader: `lrq --version` works without any package, also on Python 3.10.
    text = (Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8")
    return re.findall(r'^version = "(.+)"$', text, re.M)[0]


VERSION = _read_version()
