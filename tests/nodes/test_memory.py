"""Memory and temporary files: what ComfyUI's requests to free memory release."""

import os
import shutil
import uuid
from pathlib import Path

import numpy as np
import pytest

from learned_rounding.benchmarks.tiny_model.graph import MODEL, latents
from learned_rounding.hosts.server import HOST_DEVICE
from learned_rounding.quant_core.output import verify_file
from learned_rounding.tests.nodes.probing import ProbedGraph, progress, saved_path, text, unique

MARGIN = 1 << 20  # bytes of the GPU


def seed() -> int:
    """A seed whose results no server has."""
    return uuid.uuid4().int % 2**31


def temporary(comfy) -> set[str]:
    return {path.name for path in (comfy.base / "temp").glob("learned_rounding*")}


def free(comfy, graph=None, **flags) -> dict[str, int]:
    """POST /free, and wait until it is done; returns the memory in use. ``graph``: a workflow that stays in the node cache."""
    comfy.free(**flags)
    for _ in range(2):  # the second one is executed after the flags are taken
        idle = ProbedGraph()
        idle.add("PreviewAny", source="idle")
        comfy.queue(graph or idle)
    return comfy.get("/probe/memory")


def test_unloading_models_keeps_the_result_and_freeing_memory_deletes_its_file(comfy, request):
    def build(seed: int) -> ProbedGraph:
        graph = ProbedGraph()
        quantized = graph.quantize(graph.lora(graph.load()[0])[0], seed=seed, rounding="nearest")
        graph.sample(quantized[0], f"{unique(request)}-{seed}", steps=2)
        return graph

    comfy.queue(build(seed()))
    before = free(comfy)  # after a first run, whose workspaces torch keeps
    assert temporary(comfy) == set()

    graph = build(seed())
    result = comfy.queue(graph)
    assert progress(result)
    assert len(made := temporary(comfy)) == 1
    during = comfy.get("/probe/memory")
    unloaded = free(comfy, graph, free_memory=False)
    assert temporary(comfy) == made
    again = comfy.queue(graph)
    assert again.executed == []
    assert temporary(comfy) == made
    quantize = next(key for key, node in graph.items() if node["class_type"] == "LearnedRoundingQuantize")
    graph.add("PreviewAny", source=[quantize, 3])
    again = comfy.queue(graph)
    assert quantize in again.executed
    assert not progress(again)
    assert temporary(comfy) == made
    freed = free(comfy)
    assert temporary(comfy) == set()
    assert progress(comfy.queue(graph))  # nothing was saved
    if HOST_DEVICE == "cuda":
        assert during["pinned"] > before["pinned"] == unloaded["pinned"] == freed["pinned"], (before, during, unloaded)
        assert max(unloaded["tensors"], freed["tensors"]) <= before["tensors"] + MARGIN, (before, during, unloaded)


def add_calibration(comfy, graph: ProbedGraph, name: str) -> list:
    """Calibrate and save the statistics in a graph of their own; returns the output of Load Calibration in ``graph``."""
    first = ProbedGraph()
    calibration = first.calibrate(first.load()[0], seed=seed(), steps=2)
    saved = first.add("LearnedRoundingSaveCalibration", calibration=calibration[0], filename_prefix=name)
    return graph.add("LearnedRoundingLoadCalibration", file=saved_path(comfy.queue(first), saved).name)[0]


@pytest.mark.parametrize("source", ["file", "file with a calibration", "model with a LoRA"])
def test_freed_run_uses_its_saved_file(comfy, request, source):
    graph, name = ProbedGraph(), unique(request)
    origin = graph.lora(graph.load()[0]) if source == "model with a LoRA" else graph.source()
    calibration = add_calibration(comfy, graph, name) if source == "file with a calibration" else None
    quantized = graph.quantize(origin[0], "int8_tensorwise", calibration=calibration, seed=seed())
    graph.sample(quantized[0], name, steps=2)
    shown = graph.add("PreviewAny", source=quantized[3])
    report = graph.add("PreviewAny", source=graph.add("LearnedRoundingReport", quantized=quantized[2])[0])
    saved = graph.save(quantized, name)
    free(comfy)
    first = comfy.queue(graph)
    path, expected = saved_path(first, saved), latents(comfy.output_dir, name)
    content = path.read_bytes()
    free(comfy)
    assert temporary(comfy) == set()
    assert path.read_bytes() == content

    second = comfy.queue(graph)
    assert quantized.id in second.executed
    assert progress(first)
    assert not progress(second)
    assert all(text(second, node) == text(first, node) for node in (shown, report))
    assert saved_path(second, saved) != path
    assert saved_path(second, saved).read_bytes() == content
    assert not verify_file(path).problems
    assert np.array_equal(latents(comfy.output_dir, name)[len(expected) :], expected)
    free(comfy)
    assert temporary(comfy) == set()
    assert path.read_bytes() == content  # the user's file stays


CHANGES = ["saved file deleted", "saved file written to", "saved file of another run", "newer source", "another recipe"]


@pytest.mark.parametrize("change", CHANGES)
def test_changed_file_or_inputs_are_quantized_again(comfy, request, change):
    name = unique(request)
    source = comfy.models_dir / "diffusion_models" / f"{name}.safetensors"
    shutil.copyfile(comfy.models_dir / "diffusion_models" / MODEL, source)
    first = 10**6 + seed() % 10**6  # seeds of equal length: headers of equal size

    def run(seed: int) -> tuple[Path, bool]:
        """The saved file, and whether the node has quantized."""
        graph = ProbedGraph()
        saved = graph.save(graph.quantize(graph.source(f"diffusion_models/{source.name}")[0], seed=seed), name)
        result = comfy.queue(graph)
        return saved_path(result, saved), bool(progress(result))

    path, quantized = run(first)
    assert quantized
    other, _ = run(first + 1) if change == "saved file of another run" else (None, True)
    free(comfy)
    status = path.stat()
    if other:
        shutil.copyfile(other, path)
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
        assert path.stat().st_size == status.st_size
    elif change == "saved file deleted":
        path.unlink()
    elif change == "saved file written to":
        path.write_bytes(path.read_bytes())
    elif change == "newer source":
        source.write_bytes(source.read_bytes())
    _, quantized = run(first + (change == "another recipe"))
    assert quantized
