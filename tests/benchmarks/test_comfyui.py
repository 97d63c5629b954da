"""Benchmark of sampling steps: summaries of traces, model shapes, choices, and a tiny run in real ComfyUI."""

import argparse
import itertools
import json
import math
import sys

import pytest
import torch
from safetensors import safe_open

from learned_rounding.benchmarks import comfyui
from learned_rounding.benchmarks.sampling.model import MODELS, lora_specs, write_model
from learned_rounding.benchmarks.sampling.profile import STEP, format_profile, summarize_trace
from learned_rounding.benchmarks.sampling.variants import FORMATS, SOURCE, Setting, make_file, parse_variants
from learned_rounding.hosts import HostError


def event(cat, name, ts, dur, tid=1):
    return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur, "tid": tid}


@pytest.fixture
def trace(tmp_path):
    """Two steps of 10 ms in µs: overlapping kernels, nested operators, a wait for the GPU, another thread."""
    events = [
        event("user_annotation", STEP, 0, 10_000),
        event("user_annotation", STEP, 20_000, 10_000),
        event("cpu_op", "linear", 1_000, 4_000),
        event("cpu_op", "mm", 2_000, 1_000),
        event("cpu_op", "linear", 21_000, 4_000),
        event("cpu_op", "linear", 22_000, 9_000, tid=2),
        event("cuda_runtime", "cudaStreamSynchronize", 6_000, 2_000),
        *[event("cuda_runtime", "cudaLaunchKernel", 8_500 + 10 * index, 5) for index in range(8)],
        event("cuda_runtime", "cudaLaunchKernel", 9_000, 425),
        event("kernel", "gemm", 3_000, 4_000, tid=7),
        event("kernel", "gemm", 5_000, 4_000, tid=8),
        event("gpu_memcpy", "copy", 22_000, 1_000, tid=7),
        {"ph": "M", "name": "process_name"},
    ]
    path = tmp_path / "run.trace"
    path.write_text(json.dumps({"traceEvents": events}), encoding="utf-8")
    return path


def test_summary_counts_overlapping_kernels_once(trace):
    summary = summarize_trace(trace)
    assert summary["steps"] == 2
    assert summary["window_ms"] == pytest.approx(10.0)  # 3 to 23 ms
    assert summary["gpu_busy_ms"] == pytest.approx(3.5)  # 3 to 9 and 22 to 23 ms
    assert summary["gpu_idle"] == pytest.approx(0.65)
    assert summary["kernels"] == [{"name": "gemm", "calls": 1, "ms": 4}, {"name": "copy", "calls": 0.5, "ms": 0.5}]


def test_summary_separates_host_time_from_waiting_and_nested_operators(trace):
    summary = summarize_trace(trace)
    assert summary["waiting_ms"] == pytest.approx(1.2)  # 2 ms of synchronization, 0.4 ms of a launch into a full queue
    assert summary["host_ms"] == pytest.approx(8.8)
    assert summary["operators"] == [{"name": "linear", "calls": 1, "ms": 4}, {"name": "mm", "calls": 0.5, "ms": 0.5}]
    assert summary["operators_self"][0] == {"name": "linear", "calls": 1, "ms": 3.5}
    text = format_profile("bf16", summary)
    assert "gpu_idle" in text and "gemm" in text


def test_summary_of_a_cpu_run_has_no_gpu_time(trace):
    events = [e for e in json.loads(trace.read_text(encoding="utf-8"))["traceEvents"] if e.get("tid") == 1]
    trace.write_text(json.dumps({"traceEvents": events}), encoding="utf-8")
    assert "gpu_busy_ms" not in summarize_trace(trace) and "linear" in format_profile("bf16", summarize_trace(trace))


@pytest.mark.parametrize(("name", "parameters", "layers"), [("flux", 11.9e9, 304), ("wan14b", 14.3e9, 400)])
def test_full_models_have_the_published_size(name, parameters, layers):
    model = MODELS[name]
    specs = dict(model.specs(model.hidden, model.blocks))
    assert sum(math.prod(spec.shape) for spec in specs.values()) == pytest.approx(parameters, rel=0.005)
    assert len(dict(lora_specs(specs, 16))) == 2 * layers


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "model.safetensors"
    write_model(path, dict(MODELS["flux"].specs(256, (1, 1))), torch.device("cpu"))
    return path


def test_same_seed_gives_the_same_model(source, tmp_path):
    again = tmp_path / "again.safetensors"
    write_model(again, dict(MODELS["flux"].specs(256, (1, 1))), torch.device("cpu"))
    assert again.read_bytes() == source.read_bytes()


def test_calibrated_file_has_an_input_scale_above_the_activations(source, tmp_path):
    target = tmp_path / "fp8.safetensors"
    make_file(source, target, "fp8_calibrated")
    with safe_open(target, "pt") as file:
        scales = [file.get_tensor(name) for name in file.keys() if name.endswith(".input_scale")]
    assert len(scales) == 13 and all(16 < 448 * float(scale) < 32 for scale in scales)


def test_formats_with_a_choice_of_kernels_are_measured_with_each():
    assert list(map(str, parse_variants("int8_row,fp8,int8_convrot:ours,bf16"))) == [
        "bf16",
        "fp8",
        "int8_row:stock",
        "int8_row:ours",
        "int8_row:auto",
        "int8_convrot:ours",
    ]
    for text in ("fp9", "fp8:ours", "int8_row:theirs"):
        with pytest.raises(argparse.ArgumentTypeError, match="use "):
            parse_variants(text)


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
    assert status == 0 and result["model"] == "flux"
    assert [(row["section"], row["variant"]) for row in result["rows"]] == list(
        itertools.product(("eager", "lora"), ("bf16", "int8_convrot:stock"))
    )
    for row in result["rows"]:
        assert row["sampler s"] > row["first step s"] > 0 and row["again: sampler s"] > 0
        assert row["ratio"] == 1 if row["variant"] == SOURCE else 0 < row["latent error"] < 0.01
    for details in result["runs"]:
        assert len(details["step_seconds"]) == len(details["host_seconds"]) == 3
        assert details["profile"]["steps"] == 3 and details["profile"]["operators"]
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
    assert rows["fp8_row"]["error"] == "disk full" and "UNETLoader" in rows["fp8"]["error"]
    assert rows["fp8_block"]["latent error"] == 0 and rows["fp8_block"]["error"] == "no profiler"
    assert "error" not in rows["bf16"] and rows["bf16"]["host busy ms"] == 1
