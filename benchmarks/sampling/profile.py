"""Summary of a trace of torch.profiler over sampling steps."""

import json
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

__all__ = ["format_profile", "summarize_trace"]

STEP = "benchmark step"  # name of a step in the trace; also in nodes/__init__.py
_GPU = ("kernel", "gpu_memcpy", "gpu_memset")  # categories of work on the GPU
_SYNCHRONIZING = ("cudaDeviceSynchronize", "cudaStreamSynchronize", "cudaEventSynchronize")
_QUEUEING = (
    "cudaLaunchKernel",
    "cuLaunchKernel",
    "cudaMemcpyAsync",
)  # prefixes of calls that wait if the queue is full
_USUAL = 5  # a queueing call takes up to this multiple of their lower quartile; more is waiting
_TOP = 25


def _union(intervals: Iterable[tuple[float, float]]) -> float:
    """Length of the union of (start, end) intervals."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(intervals):
        total += max(end - max(start, reached), 0.0)
        reached = max(reached, end)
    return total


def _interval(event: dict) -> tuple[float, float]:
    return event["ts"], event["ts"] + event["dur"]


def _waiting(calls: Iterable[dict]) -> float:
    """Time in µs that calls of the CUDA runtime wait for the GPU: synchronization, and queueing when the queue is full."""
    calls = [call for call in calls if call.get("cat") in ("cuda_runtime", "cuda_driver")]
    queueing = sorted(call["dur"] for call in calls if call["name"].startswith(_QUEUEING))
    usual = _USUAL * queueing[len(queueing) // 4] if queueing else 0.0
    synchronizing = sum(call["dur"] for call in calls if call["name"] in _SYNCHRONIZING)
    return synchronizing + sum(max(duration - usual, 0.0) for duration in queueing)


def _top(events: Iterable[dict], steps: int) -> list[dict]:
    """The events of most total time by name: calls and milliseconds per step."""
    totals: dict[str, list[float]] = defaultdict(lambda: [0, 0.0])
    for event in events:
        totals[event["name"]][0] += 1
        totals[event["name"]][1] += event["dur"] / 1e3
    rows = sorted(totals.items(), key=lambda item: -item[1][1])[:_TOP]
    return [{"name": name, "calls": calls / steps, "ms": ms / steps} for name, (calls, ms) in rows]


def _with_self_time(events: Iterable[dict]) -> list[dict]:
    """Nested events of one thread with the time of their children subtracted."""
    result, stack = [], []
    for event in sorted(events, key=lambda event: (event["ts"], -event["dur"])):
        while stack and event["ts"] >= _interval(stack[-1])[1]:
            stack.pop()
        own = dict(event, self=event["dur"])
        if stack:
            stack[-1]["self"] -= event["dur"]
        stack.append(own)
        result.append(own)
    return [dict(event, dur=event["self"]) for event in result]


def summarize_trace(path: Path) -> dict:
    """Summarize a Chrome trace of profiled steps. The profiler itself lengthens host times.

    Returns:
        ``steps``: number of steps. In ms per step: ``host_ms``, the Python thread in a step without waiting for the GPU,
        ``waiting_ms``, that waiting, ``window_ms`` from the first to the last moment of GPU work, and ``gpu_busy_ms``, the
        union of that work. ``gpu_idle``: idle fraction of the window. ``kernels``, ``operators`` (with nested operators)
        and ``operators_self`` (without): those of most time, with name, calls and ms per step. A run without a GPU has no
        window and no kernels.
    """
    events = [e for e in json.loads(path.read_text(encoding="utf-8"))["traceEvents"] if e.get("ph") == "X"]
    marks = [e for e in events if e["name"] == STEP and e.get("cat") == "user_annotation"]
    steps = len(marks)
    work = [e for e in events if e.get("cat") in _GPU]
    inside = [e for e in events if any(m["tid"] == e["tid"] and m["ts"] <= e["ts"] < _interval(m)[1] for m in marks)]
    operators = [e for e in inside if e.get("cat") == "cpu_op"]
    waiting = _waiting(inside) / 1e3
    summary = {
        "steps": steps,
        "host_ms": (sum(mark["dur"] for mark in marks) / 1e3 - waiting) / steps,
        "waiting_ms": waiting / steps,
        "operators": _top(operators, steps),
        "operators_self": _top(_with_self_time(operators), steps),
    }
    if work:
        intervals = [_interval(e) for e in work]
        window = max(end for _, end in intervals) - min(start for start, _ in intervals)
        busy = _union(intervals)
        summary |= {
            "window_ms": window / 1e3 / steps,
            "gpu_busy_ms": busy / 1e3 / steps,
            "gpu_idle": 1 - busy / window,
            "kernels": _top(work, steps),
        }
    return summary


def format_profile(title: str, summary: dict) -> str:
    """The summary as text."""
    lines = [f"profile of {title}, {summary['steps']} steps, ms per step"]
    numbers = {key: value for key, value in summary.items() if isinstance(value, float)}
    lines += [f"  {key:<12} {value:10.3f}" for key, value in numbers.items()]
    for section in ("kernels", "operators", "operators_self"):
        lines += [f"  {section}:        ms     calls  name"] if summary.get(section) else []
        lines += [f"  {row['ms']:19.3f} {row['calls']:9.1f}  {row['name'][:90]}" for row in summary.get(section, ())]
    return "\n".join(lines)
