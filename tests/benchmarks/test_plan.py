"""The benchmark of plans: Flux.1 dev's header is planned without reading more than it, and what is foreseen is what is taken."""

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
    path, decided = tmp_path / "flux.safetensors", []
    benchmark.make_header(path)
    assert path.stat().st_size > 23e9 and path.stat().st_blocks * 512 < 1e6  # holes
    monkeypatch.setattr(SafetensorsFile, "_values", lambda *_: pytest.fail("a tensor was read"))
    decide = plan._decide
    monkeypatch.setattr(plan, "_decide", lambda name, *rest: decided.append(name) or decide(name, *rest))
    assert main(["plan", "-i", str(path), "--int8", "--convrot"]) == 0
    assert sorted(decided) == sorted(benchmark.flux())
    sentences(capsys.readouterr().out.splitlines()[-1])


def test_what_is_foreseen_is_what_is_taken(tmp_path, monkeypatch):
    target = tmp_path / "plan.json"
    monkeypatch.setattr(sys, "argv", ["plan.py", "--quick", "--rounds", "1", "--json", str(target)])
    monkeypatch.setattr(benchmark, "_SMALL", 64)
    for table, kept in (("RECIPES", "int8 row nearest"), ("_COMMANDS", "lrq plan")):
        monkeypatch.setattr(benchmark, table, {kept: getattr(benchmark, table)[kept]})
    benchmark.main()
    result = json.loads(target.read_text(encoding="utf-8"))
    assert [row["recipe"] for row in result["rows"]] == list(benchmark.RECIPES)
    for row in result["rows"]:
        assert row["size foreseen MB"] == pytest.approx(row["size MB"], rel=1e-3)
        assert row["seconds foreseen"] > 0 and row["seconds"] > 0
    assert [row["command"] for row in result["commands"]] == list(benchmark._COMMANDS)
