"""The version is read from pyproject.toml without a TOML reader."""

import re

from learned_rounding.quant_core.recipes.toml import tomllib
from learned_rounding.quant_core.version import VERSION
from learned_rounding.tests.sentences import TESTS


def test_the_version_is_that_of_the_project():
    project = tomllib.loads((TESTS.parent / "pyproject.toml").read_text(encoding="utf-8"))
    assert project["project"]["version"] == VERSION


def test_the_version_has_three_numbers():
    assert re.fullmatch(r"\d+\.\d+\.\d+", VERSION)
