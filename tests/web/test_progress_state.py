"""What the widgets show is computed by pure functions; node tests them without a browser."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

NEEDED = (20, 19)  # the first to take a plain .js file for the ES module that it is


def _node_version() -> tuple[int, ...]:
    if shutil.which("node") is None:
        return ()
    told = subprocess.run(["node", "--version"], capture_output=True, text=True, check=True).stdout
    return tuple(map(int, re.findall(r"\d+", told)))[:2]


def test_pure_functions():
    version = _node_version()
    if version < NEEDED:
        pytest.skip("needs node {}.{} or newer; here is {}".format(*NEEDED, ".".join(map(str, version)) or "none"))
    run = subprocess.run(["node", "--test", str(Path(__file__).parent)], capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stdout + run.stderr
