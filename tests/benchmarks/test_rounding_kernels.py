"""Benchmark of the rounding kernels: a tiny run has a row for every kernel and element format."""

import json
import sys

import pytest

from learned_rounding.benchmarks import rounding_kernels


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    result = tmp_path_factory.mktemp("rounding_kernels") / "result.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["rounding_kernels.py", "--quick", "--json", str(result)])
        rounding_kernels.main()
    return json.loads(result.read_text(encoding="utf-8"))["rows"]


def test_every_kernel_is_measured_with_every_element_format(rows):
    elements = set(rounding_kernels.ELEMENTS)
    measured = {
        kernel: {row["elements"] for row in rows if row["kernel"] == kernel}
        for kernel in {row["kernel"] for row in rows}
    }
    assert measured == {
        "round_block": elements,
        "scale_errors": elements,
        "search_level_scales": {"levels"},
        "round_block_beam": {*elements, "levels"},
    }


def test_the_beam_is_measured_with_every_width(rows):
    assert {row["width"] for row in rows if row["section"] == "beam"} == set(rounding_kernels.WIDTHS)


def test_times_are_positive(rows):
    assert [row for row in rows if not row["reference µs"] > 0] == []
