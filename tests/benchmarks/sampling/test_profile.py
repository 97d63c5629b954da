"""Summaries of traces of sampling steps."""

import json

import pytest

from learned_rounding.benchmarks.sampling.profile import STEP, format_profile, summarize_trace


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


def test_the_profile_names_idle_time_and_kernels(trace):
    text = format_profile("bf16", summarize_trace(trace))
    assert "gpu_idle" in text
    assert "gemm" in text


def test_summary_of_a_cpu_run_has_no_gpu_time(trace):
    events = [e for e in json.loads(trace.read_text(encoding="utf-8"))["traceEvents"] if e.get("tid") == 1]
    trace.write_text(json.dumps({"traceEvents": events}), encoding="utf-8")
    assert "gpu_busy_ms" not in summarize_trace(trace)
    assert "linear" in format_profile("bf16", summarize_trace(trace))
