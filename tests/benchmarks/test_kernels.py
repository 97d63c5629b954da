"""Kernel benchmark: a tiny run measures every format."""

import json
import sys

import pytest

from learned_rounding.benchmarks import kernels, kernels_report

H100 = "NVIDIA H100 80GB HBM3"


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
