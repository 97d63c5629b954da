"""Coverage-guided fuzzing: `pip install -e ".[fuzz]"`, then `python tests/fuzz/guided.py files -max_total_time=300`.

The first argument selects the input: `files`, one kind of file such as `.gguf`, or `texts`. All others are options of libFuzzer.
The strategies are those of `test_fuzz.py`.
"""

# ruff: noqa: E402  (the command line is parsed before atheris is imported)

import argparse
import sys
import tempfile
from collections import Counter
from pathlib import Path

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("what", choices=("files", ".safetensors", ".safetensors.index.json", ".gguf", ".pt", "texts"))
options, fuzzer_options = parser.parse_known_args()

import atheris

with atheris.instrument_imports(include=["learned_rounding.quant_core"]):
    from learned_rounding.tests.fuzz.entry_points import TEXTS as TEXT_ENTRY_POINTS
    from learned_rounding.tests.fuzz.entry_points import refusal, try_all

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from learned_rounding.tests.fuzz.strategies import FILES, TEXTS

FREE = settings(deadline=None, database=None, suppress_health_check=list(HealthCheck))
COUNTS = Counter()


def _count(accepted: bool) -> None:
    """Count and print the inputs that were drawn, because many of libFuzzer's runs are too short to draw one."""
    COUNTS.update(tried=1, accepted=accepted)
    if COUNTS["tried"] % 100 == 0:
        print(f"{COUNTS['tried']:,} tried, {COUNTS['accepted']:,} accepted by at least one entry point", flush=True)


def _files(kinds):
    @FREE
    @given(st.one_of(*(FILES[kind] for kind in kinds)))
    def files(contents):
        with tempfile.TemporaryDirectory() as folder:
            for name, content in contents.items():
                (Path(folder) / name).write_bytes(content)
            _count(None in try_all(Path(folder) / next(iter(contents))).values())

    return files


@FREE
@given(st.one_of(*TEXTS.values()))
def texts(text):
    _count(None in [refusal(entry_point, text) for entry_point in TEXT_ENTRY_POINTS.values()])


if __name__ == "__main__":
    target = texts if options.what == "texts" else _files(FILES if options.what == "files" else [options.what])
    # No file can be drawn from a short input.
    atheris.Setup([sys.argv[0], *fuzzer_options, "-len_control=0", "-max_len=4096"], target.hypothesis.fuzz_one_input)
    atheris.Fuzz()
