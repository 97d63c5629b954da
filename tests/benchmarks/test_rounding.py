"""Rounding benchmark: a tiny run has a row for every format and method, and its errors are plausible."""

import json
import sys

import pytest

from learned_rounding.benchmarks import rounding
from learned_rounding.benchmarks.rounding_methods import CASES
from learned_rounding.benchmarks.rounding_report import markdown

METHODS = ("nearest", "scale search", "principal", "calibrated, 0 sweeps", "calibrated, 4 sweeps")


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    target = tmp_path_factory.mktemp("rounding") / "result.json"
    with pytest.MonkeyPatch.context() as patch:
        command = ["--quick", "--only", "synthetic", "--size", "64", "--iterations", "0", "--json", str(target)]
        patch.setattr(sys, "argv", ["rounding.py", *command, "--methods", *METHODS])
        rounding.main()
    return json.loads(target.read_text(encoding="utf-8"))


@pytest.fixture
def rows(result):
    """(weight, format, granularity, method) → row."""
    return {(row["weight"], row["format"], row["per"], row["method"]): row for row in result["rows"]}


def test_every_format_has_a_row_for_every_main_method(result, rows):
    weights = {row["weight"] for row in result["rows"]}
    expected = {(weight, *case.columns.values(), method) for weight in weights for case in CASES for method in METHODS}
    assert rows.keys() == expected
    assert len(rows) == len(result["rows"])


def test_gptq_beats_nearest_with_correlated_activations(subtests, rows):
    for (*where, method), row in rows.items():
        if method.startswith("calibrated"):
            for activations in ("anisotropic", "aligned"):
                with subtests.test(str(where), method=method, activations=activations):
                    assert row[activations] < 0.9 * rows[(*where, "nearest")][activations]


def test_tables_have_device_and_date(result):
    text = markdown(result)
    assert result["device"] in text
    assert result["date"] in text


def test_tables_have_a_line_for_a_format_and_a_method(result):
    assert "| float8_e4m3fn tensor | calibrated, 0 sweeps |" in markdown(result)
