"""What pip and ComfyUI are told about this repository stays true."""

import re
import subprocess
from pathlib import Path

import pytest

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
NOT_SHIPPED = {"assets", "benchmarks", "hosts", "tests"}


@pytest.fixture(scope="module")
def project():
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_every_package_is_listed(project):
    """The list is by hand (the root folder is the package): a folder left out would be missing from wheels only."""
    tracked = subprocess.run(
        ["git", "ls-files", "*__init__.py"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    folders = {Path(name).parent for name in tracked}
    expected = {".".join(("learned_rounding", *f.parts)) for f in folders if not NOT_SHIPPED & set(f.parts)}
    assert set(project["tool"]["setuptools"]["packages"]) == expected


def test_requirements_are_the_same_in_both_files_and_leave_torch_alone(project):
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").split("\n")
    assert [line for line in lines if line] == project["project"]["dependencies"]
    extras = sum(project["project"]["optional-dependencies"].values(), [])
    assert not [line for line in lines + extras if re.match(r"torch\b", line)]
