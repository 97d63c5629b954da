"""Kernel benchmark: the README agrees with the recorded result, and a tiny run measures every format."""

import json
import sys
from pathlib import Path

import pytest

from learned_rounding.benchmarks import kernels, kernels_report

BENCHMARKS = Path(kernels.__file__).parent
README = (BENCHMARKS / "README.md").read_text(encoding="utf-8")
RESULT = json.loads((BENCHMARKS / "results" / "kernels_h100.json").read_text(encoding="utf-8"))
H100 = RESULT["device"]


@pytest.mark.parametrize("section", ["linear", "memory", "block"])
def test_readme_has_the_tables_of_the_result(section):
    assert f"\n\n{kernels_report.tables(RESULT)[section]}\n\n" in README


@pytest.mark.parametrize("sentence", kernels_report.sentences(RESULT))
def test_readme_has_the_sentences_of_the_result(sentence):
    assert sentence in " ".join(README.split())


def test_readme_has_device_date_and_command():
    assert all(RESULT[key] in README for key in ("device", "date", "torch", "command"))


def test_floor_is_the_larger_of_compute_and_memory_time():
    assert kernels_report.floor(H100, 4096, 3072, 3072) == pytest.approx(2 * 4096 * 3072**2 / 1979e12 * 1e6)
    assert kernels_report.floor(H100, 1, 18432, 3072) == pytest.approx(
        (4 * 3072 + 18432 * 3072 + 2 * 18432) / 3.35e12 * 1e6
    )
    assert kernels_report.floor("unknown GPU", 1, 1, 1) is None


def test_floor_agrees_with_the_recorded_fractions():
    for row in RESULT["rows"]:
        if row["section"] == "linear":
            least = kernels_report.floor(H100, *map(int, row["shape"].split("×")))
            assert least * row["int8 row"] / row["F.linear µs"] == pytest.approx(row["int8 row of floor"])


def test_sentences_report_met_goals_and_omit_missing_alternatives():
    rows = [{**row, "fp8 block": 2.0, "inputs int8 row, rotated": 0.9} for row in RESULT["rows"]]
    text = " ".join(kernels_report.sentences({**RESULT, "rows": rows}))
    assert "FP8 block, goal 1.45 on Flux's shapes: met by Flux.1 proj (2.00)" in text and "missed by none" in text
    assert "Of 20 MB and more" not in text
    without_kitchen = [{key: value for key, value in row.items() if "kitchen" not in key} for row in RESULT["rows"]]
    assert "comfy-kitchen" not in " ".join(kernels_report.sentences({**RESULT, "rows": without_kitchen}))


def test_tiny_run_has_a_floor_for_every_format(tmp_path, monkeypatch):
    for name, value in {"QUICK": kernels.QUICK[:1], "environment": lambda: {"device": H100}}.items():
        monkeypatch.setattr(kernels, name, value)
    monkeypatch.setattr(kernels, "blocks", lambda quick: [{"section": "block", "format": "bf16", "eager ms": 1.0}])
    result, tables = tmp_path / "result.json", tmp_path / "tables.md"
    monkeypatch.setattr(sys, "argv", ["kernels.py", "--quick", "--json", str(result), "--markdown", str(tables)])
    kernels.main()
    row = json.loads(result.read_text(encoding="utf-8"))["rows"][0]
    least = kernels_report.floor(H100, *kernels.QUICK[0][2:])
    for name in kernels.FORMATS:
        assert row[f"{name} of floor"] == pytest.approx(least * row[name] / row["F.linear µs"])
    assert "| tiny proj | 64×128×128 |" in tables.read_text(encoding="utf-8")
