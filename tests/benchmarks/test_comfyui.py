"""Benchmark of sampling steps: its choices, and a tiny run in real ComfyUI."""

import itertools
import json
import sys

import pytest

from learned_rounding.benchmarks import comfyui
from learned_rounding.benchmarks.sampling.variants import FORMATS, SOURCE, Setting, parse_variants
from learned_rounding.hosts import HostError


def test_settings_share_a_server_unless_their_memory_differs():
    keys = {name: setting.server_key for name, setting in comfyui.SETTINGS.items()}
    assert keys["eager"] == keys["compile"] == keys["lora"]
    assert len({keys[name] for name in ("eager", "free16", "free12", "dynamic")}) == 4


def test_options_change_all_settings(monkeypatch):
    monkeypatch.setattr(
        sys, "argv", ["comfyui.py", "--settings", "eager,free16", "--lora", "--dynamic-vram", "on", "--free-vram", "8"]
    )
    args = comfyui.arguments("", *comfyui.OPTIONS)
    expected = Setting(dynamic_vram=True, free_vram=8, lora=True)
    assert comfyui.choose_settings(args) == {"eager": expected, "free16": expected}
    assert len(args.variants) == len(parse_variants(",".join(FORMATS)))


@pytest.fixture
def run(host, tmp_path, monkeypatch):
    """run(*options) → exit status and the JSON of the benchmark with a tiny model on the CPU."""
    if host.version == "0.3.75":
        pytest.skip("ComfyUI 0.3.75 does not read the width of a Flux from its tensors")

    def call(*options):
        file = tmp_path / "result.json"
        fixed = ["--quick", "--cpu", "--host-version", host.version, "--folder", str(tmp_path), "--json", str(file)]
        monkeypatch.setattr(sys, "argv", ["comfyui.py", *fixed, *options])
        status = comfyui.main()
        return status, json.loads(file.read_text(encoding="utf-8"))

    return call


def test_tiny_run_measures_steps_of_every_variant(run, tmp_path):
    status, result = run(
        "--variants", "bf16,int8_convrot:stock", "--settings", "eager,lora", "--profile", "--first-step"
    )
    assert status == 0
    assert result["model"] == "flux"
    assert [(row["section"], row["variant"]) for row in result["rows"]] == list(
        itertools.product(("eager", "lora"), ("bf16", "int8_convrot:stock"))
    )
    for row in result["rows"]:
        assert row["sampler s"] > row["first step s"] > 0
        assert row["again: sampler s"] > 0
        assert row["ratio"] == 1 if row["variant"] == SOURCE else 0 < row["latent error"] < 0.01
    for details in result["runs"]:
        assert len(details["step_seconds"]) == len(details["host_seconds"]) == 3
        assert details["profile"]["steps"] == 3
        assert details["profile"]["operators"]
    assert not list(tmp_path.glob("comfyui-benchmark-*"))


def test_failed_variant_is_reported_and_the_others_are_measured(run, monkeypatch):
    def fail(source, target, name):
        if name == "fp8_row":
            raise OSError("disk full")
        target.write_bytes(b"not a model" if name == "fp8" else source.read_bytes())

    def profile(self, file, **options):
        if "fp8_block" in file:
            raise HostError("no profiler", kind="execution")
        return {"steps": 3, "host_ms": 1.0}

    monkeypatch.setattr(comfyui, "make_file", fail)
    monkeypatch.setattr(comfyui.Session, "profile", profile)
    status, result = run("--variants", "bf16,fp8,fp8_row,fp8_block", "--profile")
    rows = {row["variant"]: row for row in result["rows"]}
    assert status == 1
    assert rows["fp8_row"]["error"] == "disk full"
    assert "UNETLoader" in rows["fp8"]["error"]
    assert rows["fp8_block"]["latent error"] == 0
    assert rows["fp8_block"]["error"] == "no profiler"
    assert "error" not in rows["bf16"]
    assert rows["bf16"]["host busy ms"] == 1
