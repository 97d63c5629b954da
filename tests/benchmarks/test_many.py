"""Benchmark of several formats at once: a tiny run, what it counts, and what it leaves unmeasured."""

import json
import sys

import pytest
import torch

from learned_rounding.benchmarks import many
from learned_rounding.quant_core.sources import TensorSource


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    """Of a run with tiny weights and two formats."""
    folder = tmp_path_factory.mktemp("many")
    words = ["many.py", "--quick", "--rounds", "1", "--json", str(folder / "many.json"), "--folder", str(folder)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", words)
        patch.setattr(many, "_QUICK_WIDTH", 64)
        patch.setattr(many, "FORMATS", {name: many.FORMATS[name] for name in ("fp8", "int8")})
        patch.setattr(many, "ON_DEVICES", ("int8",))
        many.main()
    assert [path.name for path in folder.iterdir()] == ["many.json"]
    return json.loads((folder / "many.json").read_text(encoding="utf-8"))


@pytest.fixture
def rows(result):
    """rows(section) → its rows by step."""
    return lambda section: {row.get("step"): row for row in result["rows"] if row["section"] == section}


def test_the_source_is_read_once_for_all_formats(rows):
    row = rows("nearest")["2 formats together"]
    assert row["most reads of a tensor"] == 1
    assert row["source read"] == pytest.approx(1, abs=0.1)  # the header is not counted


def test_times_are_compared_with_reading_and_writing(rows):
    found = rows("nearest")
    most = max(found[step]["seconds"] for step in ("read the source", "write the outputs"))
    together = found["2 formats together"]
    assert together["x the larger"] == pytest.approx(together["seconds"] / most)


def test_calibrated_formats_are_compared_with_single_runs(rows):
    found = rows("calibrated")
    assert found["2 runs"]["seconds"] == pytest.approx(found["fp8"]["seconds"] + found["int8"]["seconds"])
    assert found["2 formats together"]["x the runs"] > 0


def test_every_run_is_in_the_result(result):
    assert {label: len(times) for label, times in result["runs"].items() if "together" in label} == {
        "nearest: together": 1,
        "calibrated: together": 1,
    }


@pytest.mark.skipif(torch.cuda.device_count() > 0, reason="GPUs are measured here")
def test_numbers_of_gpus_that_are_not_here_are_not_measured(result):
    found = [row["seconds"] for row in result["rows"] if row["section"] == "devices"]
    assert found == [many.NOT_MEASURED] * 2


def test_reads_of_a_source_are_counted():
    counting = many.CountingSource(TensorSource({"a": torch.zeros(8), "b": torch.zeros(4)}))
    for name in ("a", "a", "b"):
        counting.read(name)
    assert (dict(counting.reads), counting.bytes_read) == ({"a": 2, "b": 1}, 80)
