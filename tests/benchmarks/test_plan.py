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
    assert path.stat().st_size > 23e9 and path.stat().st_blocks * 512 < 1e6  # sparse
    monkeypatch.setattr(SafetensorsFile, "_read_bytes", lambda *_: pytest.fail("a tensor was read"))
    decide = plan._decide
    monkeypatch.setattr(plan, "_decide", lambda name, *rest: planned.append(name) or decide(name, *rest))
    assert main(["plan", "-i", str(path), "--int8", "--convrot"]) == 0
    assert sorted(planned) == sorted(benchmark.flux())
    sentences(capsys.readouterr().out.splitlines()[-1])


def test_estimated_size_agrees_with_the_output(tmp_path, monkeypatch):
    target = tmp_path / "plan.json"
    monkeypatch.setattr(sys, "argv", ["plan.py", "--quick", "--rounds", "1", "--json", str(target)])
    monkeypatch.setattr(benchmark, "_QUICK_DIVISOR", 64)
    for table, name in (("RECIPES", "int8 row nearest"), ("_COMMANDS", "lrq plan")):
        monkeypatch.setattr(benchmark, table, {name: getattr(benchmark, table)[name]})
    benchmark.main()
    result = json.loads(target.read_text(encoding="utf-8"))
    assert [row["recipe"] for row in result["rows"]] == list(benchmark.RECIPES)
    for row in result["rows"]:
        assert row["size foreseen MB"] == pytest.approx(row["size MB"], rel=1e-3)
        assert row["seconds foreseen"] > 0 and row["seconds"] > 0
    assert [row["command"] for row in result["commands"]] == list(benchmark._COMMANDS)
