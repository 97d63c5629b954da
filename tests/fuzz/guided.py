"""Fuzzing that is guided by coverage: `pip install -e ".[fuzz]"`, then `python tests/fuzz/guided.py files -max_total_time=300`.

`files`, a kind of files as ``.gguf``, or `texts` says what is made up; all else are options of libFuzzer. It draws from the same strategies
as `test_fuzz.py`, and says at the end how much it tried and how much of that was taken.
"""

import atexit
import sys
import tempfile
from collections import Counter
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["learned_rounding.quant_core"]):
    from learned_rounding.tests.fuzz.doors import TEXTS as DOORS
    from learned_rounding.tests.fuzz.doors import refused, tried_all

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from learned_rounding.tests.fuzz.strategies import FILES, TEXTS

FREE = settings(deadline=None, database=None, suppress_health_check=list(HealthCheck))


TRIED = Counter()


def _files(kinds):
    @FREE
    @given(st.one_of(*(FILES[kind] for kind in kinds)))
    def files(made):
        with tempfile.TemporaryDirectory() as folder:
            for name, content in made.items():
                (Path(folder) / name).write_bytes(content)
            said = tried_all(Path(folder) / next(iter(made)))
        TRIED.update({"files": 1, "taken by a door or more": None in said.values()})

    return files


@FREE
@given(st.one_of(*TEXTS.values()))
def texts(text):
    said = [refused(door, text) for door in DOORS.values()]
    TRIED.update({"texts": 1, "taken by a door or more": None in said})


if __name__ == "__main__":
    kind = sys.argv.pop(1)
    what = texts if kind == "texts" else _files(FILES if kind == "files" else [kind])
    atexit.register(lambda: print(", ".join(f"{count:,} {name}" for name, count in TRIED.items())))
    atheris.Setup(sys.argv, what.hypothesis.fuzz_one_input)
    atheris.Fuzz()
