"""Fuzzing that is guided by coverage: `pip install -e ".[fuzz]"`, then `python tests/fuzz/guided.py files -max_total_time=300`.

`files`, a kind of files as ``.gguf``, or `texts` says what is made up; all else are options of libFuzzer. It draws from the same strategies
as `test_fuzz.py`.
"""

# ruff: noqa: E402  (options are read before atheris is imported)

import argparse
import sys
import tempfile
from collections import Counter
from pathlib import Path

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("what", choices=("files", ".safetensors", ".safetensors.index.json", ".gguf", ".pt", "texts"))
options, for_fuzzer = parser.parse_known_args()

import atheris

with atheris.instrument_imports(include=["learned_rounding.quant_core"]):
    from learned_rounding.tests.fuzz.doors import TEXTS as DOORS
    from learned_rounding.tests.fuzz.doors import refused, tried_all

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from learned_rounding.tests.fuzz.strategies import FILES, TEXTS

FREE = settings(deadline=None, database=None, suppress_health_check=list(HealthCheck))


TRIED = Counter()


def _count(taken: bool) -> None:
    """Many of libFuzzer's runs are too short to draw anything from: what was really tried is told of as it grows."""
    TRIED.update(tried=1, taken=taken)
    if TRIED["tried"] % 100 == 0:
        print(f"{TRIED['tried']:,} tried, {TRIED['taken']:,} of them taken by a door or more", flush=True)


def _files(kinds):
    @FREE
    @given(st.one_of(*(FILES[kind] for kind in kinds)))
    def files(made):
        with tempfile.TemporaryDirectory() as folder:
            for name, content in made.items():
                (Path(folder) / name).write_bytes(content)
            _count(None in tried_all(Path(folder) / next(iter(made))).values())

    return files


@FREE
@given(st.one_of(*TEXTS.values()))
def texts(text):
    _count(None in [refused(door, text) for door in DOORS.values()])


if __name__ == "__main__":
    what = texts if options.what == "texts" else _files(FILES if options.what == "files" else [options.what])
    # Short inputs are too little for a file to be drawn from, and are not tried.
    atheris.Setup([sys.argv[0], *for_fuzzer, "-len_control=0", "-max_len=4096"], what.hypothesis.fuzz_one_input)
    atheris.Fuzz()
