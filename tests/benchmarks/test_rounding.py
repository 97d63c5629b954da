"""The rounding benchmark: a tiny run has a row for every format, and calibration pays where it must."""

import json
import sys

import pytest

from learned_rounding.benchmarks import rounding
from learned_rounding.benchmarks.rounding_report import markdown
from learned_rounding.benchmarks.rounding_ways import CASES


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    target = tmp_path_factory.mktemp("rounding") / "result.json"
    with pytest.MonkeyPatch.context() as patch:
        command = ["--quick", "--only", "synthetic", "--size", "128", "--iterations", "0", "--json", str(target)]
        patch.setattr(sys, "argv", ["rounding.py", *command])
        rounding.main()
    return json.loads(target.read_text(encoding="utf-8"))


def test_every_format_has_a_row_for_every_main_method(result):
    seen = {(row["weight"], row["format"], row["per"], row["method"]) for row in result["rows"]}
    assert len(seen) == len(result["rows"])
    for weight in {row["weight"] for row in result["rows"]}:
        for case in CASES:
            for method in ("nearest", "scale search", "principal", "calibrated, 0 sweeps", "calibrated, 4 sweeps"):
                assert (weight, *case.columns.values(), method) in seen


def test_calibrated_beats_nearest_where_inputs_differ_in_strength(result):
    rows = {(row["weight"], row["format"], row["per"], row["method"]): row for row in result["rows"]}
    for (*where, method), row in rows.items():
        if method.startswith("calibrated"):
            nearest = rows[(*where, "nearest")]
            for inputs in ("anisotropic", "aligned"):
                assert row[inputs] < 0.9 * nearest[inputs]


def test_tables_name_device_and_date(result):
    text = markdown(result)
    assert result["device"] in text and result["date"] in text
    assert "| float8_e4m3fn tensor | calibrated, 0 sweeps |" in text
