"""Benchmark of W4A8 linear layers: a tiny run has the times of every implementation, and a small error."""

import json
import sys

import pytest

from learned_rounding.benchmarks import w4a8_kernels


@pytest.fixture(scope="module")
def row(tmp_path_factory):
    result = tmp_path_factory.mktemp("w4a8_kernels") / "result.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(w4a8_kernels, "QUICK", w4a8_kernels.QUICK[:1])
        patch.setattr(w4a8_kernels, "make_alternatives", lambda *arguments: {})
        patch.setattr(sys, "argv", ["w4a8_kernels.py", "--quick", "--json", str(result)])
        w4a8_kernels.main()
    (row,) = json.loads(result.read_text(encoding="utf-8"))["rows"]
    return row


def test_every_implementation_is_measured(row):
    names = ("bf16", "int8 row", "int8 row, rotated", "w4a8", "expand", "quantize")
    assert [name for name in names if not row[name] > 0] == []


def test_the_ratio_is_that_of_w4a8_to_rotated_int8(row):
    assert row["ratio"] == pytest.approx(row["w4a8"] / row["int8 row, rotated"])


def test_the_error_is_that_of_int8_activations(row):
    assert 0 < row["error"] < 0.02
