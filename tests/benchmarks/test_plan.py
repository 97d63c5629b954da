"""Plan benchmark: a plan of Flux.1 dev reads only the header, and estimates agree with the run."""

import json
import sys

import pytest

from learned_rounding.benchmarks import plan as benchmark
from learned_rounding.quant_core.cli.commands import main
from learned_rounding.quant_core.recipes import plan
from learned_rounding.quant_core.sources import SafetensorsFile


def test_a_plan_of_flux_reads_the_header_alone_and_decides_once_for_each_tensor(
    tmp_path, monkeypatch, capsys, sentences
):
    path, planned = tmp_path / "flux.safetensors", []
    benchmark.make_header(path)
    assert path.stat().st_size > 23e9
    assert path.stat().st_blocks * 512 < 1e6  # sparse
    monkeypatch.setattr(SafetensorsFile, "_read_bytes", lambda *_: pytest.fail("a tensor was read"))
    decide = plan._decide
    monkeypatch.setattr(plan, "_decide", lambda name, *rest: planned.append(name) or decide(name, *rest))
    assert main(["plan", "-i", str(path), "--int8", "--convrot"]) == 0
    assert sorted(planned) == sorted(benchmark.flux())
    sentences(capsys.readouterr().out.splitlines()[-1])


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    """Of a run with tiny weights, one recipe, and a command that takes little time."""
    target = tmp_path_factory.mktemp("plan") / "plan.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["plan.py", "--quick", "--rounds", "1", "--json", str(target)])
        patch.setattr(benchmark, "_QUICK_DIVISOR", 128)
        patch.setattr(benchmark, "RECIPES", {"int8 row nearest": benchmark.RECIPES["int8 row nearest"]})
        patch.setattr(benchmark, "_COMMANDS", {"python": ["-c", "pass"]})
        benchmark.main()
    return json.loads(target.read_text(encoding="utf-8"))


def test_estimated_size_agrees_with_the_output(result):
    (row,) = result["rows"]
    assert row["recipe"] == "int8 row nearest"
    assert row["size foreseen MB"] == pytest.approx(row["size MB"], rel=1e-3)


def test_seconds_are_estimated_and_measured(result):
    (row,) = result["rows"]
    assert row["seconds foreseen"] > 0
    assert row["seconds"] > 0


def test_commands_are_measured(result):
    (row,) = result["commands"]
    assert row["command"] == "python"
    assert row["seconds"] > 0
