"""Fuzzing that is guided by coverage: `pip install -e ".[fuzz]"`, then `python tests/fuzz/guided.py files -max_total_time=300`.

`files`, a kind of files as ``.gguf``, or `texts` says what is made up; all else are options of libFuzzer. It draws from the same strategies
as `test_fuzz.py`.
"""

import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["learned_rounding.quant_core"]):
    from learned_rounding.tests.fuzz.doors import TEXTS as DOORS
    from learned_rounding.tests.fuzz.doors import refused, tried_all

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from learned_rounding.tests.fuzz.strategies import FILES, TEXTS

FREE = settings(deadline=None, database=None, suppress_health_check=list(HealthCheck))


def _files(kinds):
    @FREE
    @given(st.one_of(*(FILES[kind] for kind in kinds)))
    def files(made):
        with tempfile.TemporaryDirectory() as folder:
            for name, content in made.items():
                (Path(folder) / name).write_bytes(content)
            tried_all(Path(folder) / next(iter(made)))

    return files


@FREE
@given(st.one_of(*TEXTS.values()))
def texts(text):
    for door in DOORS.values():
        refused(door, text)


if __name__ == "__main__":
    kind = sys.argv.pop(1)
    what = texts if kind == "texts" else _files(FILES if kind == "files" else [kind])
    # Short inputs are too little for a file to be drawn from, and are not tried.
    atheris.Setup([*sys.argv, "-len_control=0", "-max_len=4096"], what.hypothesis.fuzz_one_input)
    atheris.Fuzz()
