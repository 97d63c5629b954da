"""Every shipped kernel configuration compiles for every card we promise, with all its values in registers."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

CASES = 24  # 3 grids × (2 of round_block + 3 shapes × 2 of scale_errors)


@pytest.mark.parametrize("sm", [80, 86, 89, 90])
def test_no_kernel_spills(sm):
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("compile_all.py")
    done = subprocess.run([sys.executable, script, str(sm)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    made = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(made) == CASES
    assert [case for case in made if case["spilled"] or not case["registers"]] == []
