"""Fuzzing that is guided by coverage: `pip install -e ".[fuzz]"`, then `python tests/fuzz/guided.py files -max_total_time=300`.

`files` or `texts` says what is made up; all else are options of libFuzzer. It draws from the same strategies as `test_fuzz.py`.
"""

# ruff: noqa: E402  (options are read before atheris is imported)

import argparse
import sys
import tempfile
from pathlib import Path

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("what", choices=("files", "texts"))
options, for_fuzzer = parser.parse_known_args()

import atheris

with atheris.instrument_imports(include=["learned_rounding.quant_core"]):
    from learned_rounding.tests.fuzz.doors import TEXTS as DOORS
    from learned_rounding.tests.fuzz.doors import refused, tried_all

from hypothesis import HealthCheck, given, settings

from learned_rounding.tests.fuzz.strategies import FILES, TEXTS

FREE = settings(deadline=None, database=None, suppress_health_check=list(HealthCheck))


@FREE
@given(FILES)
def files(content):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.safetensors"
        path.write_bytes(content)
        tried_all(path)


@FREE
@given(TEXTS)
def texts(text):
    for door in DOORS.values():
        refused(door, text)


if __name__ == "__main__":
    what = {"files": files, "texts": texts}[options.what]
    atheris.Setup([sys.argv[0], *for_fuzzer], what.hypothesis.fuzz_one_input)
    atheris.Fuzz()
