"""Nearly right files and texts through every door: taken, or refused by one of our errors."""

import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings

from learned_rounding.tests.fuzz.doors import TEXTS as DOORS
from learned_rounding.tests.fuzz.doors import refused, tried_all
from learned_rounding.tests.fuzz.strategies import FILES, TEXTS

PLAIN = settings(derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))


@pytest.mark.parametrize("suffix", [".safetensors", ".safetensors.index.json", ".gguf", ".pt"])
def test_files(suffix, often, tried):
    count = often({".safetensors": 400}.get(suffix, 60), 5000)
    taken = []

    @settings(PLAIN, max_examples=count)
    @given(FILES)
    def every(content):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / f"x{suffix}"
            path.write_bytes(content)
            said = tried_all(path)
            assert path.read_bytes() == content
            taken.extend(name for name, error in said.items() if error is None)

    every()
    assert suffix != ".safetensors" or {"inspect", "verify", "plan", "quantize", "calibration"} <= set(taken)
    tried(f"a nearly right {suffix} file, through every door", count, "taken, or refused by a sentence")


@pytest.mark.parametrize("door", DOORS)
def test_texts(door, often, tried):
    count = often(400, 10_000)

    @settings(PLAIN, max_examples=count)
    @given(TEXTS)
    def every(text):
        refused(DOORS[door], text)

    every()
    tried(f"a nearly right {door}", count, "taken, or refused by a sentence")
