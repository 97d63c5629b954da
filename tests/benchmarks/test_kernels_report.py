"""Report of the kernel benchmark: the README agrees with the recorded result."""

import json
from pathlib import Path

import pytest

from learned_rounding.benchmarks import kernels_report

BENCHMARKS = Path(kernels_report.__file__).parent
README = (BENCHMARKS / "README.md").read_text(encoding="utf-8")
RESULT = json.loads((BENCHMARKS / "results" / "kernels_h100.json").read_text(encoding="utf-8"))
H100 = RESULT["device"]


def test_readme_has_the_tables_of_the_result(subtests):
    for section, table in kernels_report.tables(RESULT).items():
        with subtests.test(section):
            assert f"\n\n{table}\n\n" in README


def test_readme_has_the_sentences_of_the_result(subtests):
    text = " ".join(README.split())
    for sentence in kernels_report.sentences(RESULT):
        with subtests.test(sentence):
            assert sentence in text


def test_readme_has_device_date_and_command():
    assert [key for key in ("device", "date", "torch", "command") if RESULT[key] not in README] == []


def test_floor_is_the_larger_of_compute_and_memory_time():
    assert kernels_report.floor(H100, 4096, 3072, 3072) == pytest.approx(2 * 4096 * 3072**2 / 1979e12 * 1e6)
    assert kernels_report.floor(H100, 1, 18432, 3072) == pytest.approx(
        (4 * 3072 + 18432 * 3072 + 2 * 18432) / 3.35e12 * 1e6
    )


def test_an_unknown_gpu_has_no_floor():
    assert kernels_report.floor("unknown GPU", 1, 1, 1) is None


def test_floor_agrees_with_the_recorded_fractions():
    for row in RESULT["rows"]:
        if row["section"] == "linear":
            least = kernels_report.floor(H100, *map(int, row["shape"].split("×")))
            assert least * row["int8 row"] / row["F.linear µs"] == pytest.approx(row["int8 row of floor"])


def test_sentences_report_met_goals_and_omit_missing_alternatives():
    rows = [{**row, "fp8 block": 2.0, "inputs int8 row, rotated": 0.9} for row in RESULT["rows"]]
    text = " ".join(kernels_report.sentences({**RESULT, "rows": rows}))
    assert "FP8 block, goal 1.45 on Flux's shapes: met by Flux.1 proj (2.00)" in text
    assert "missed by none" in text
    assert "Of 20 MB and more" not in text
    without_kitchen = [{key: value for key, value in row.items() if "kitchen" not in key} for row in RESULT["rows"]]
    assert "comfy-kitchen" not in " ".join(kernels_report.sentences({**RESULT, "rows": without_kitchen}))
