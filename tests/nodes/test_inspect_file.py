"""Inspect and Quantization Report in a graph."""

import contextlib
import io

import numpy as np
from PIL import Image

from learned_rounding.quant_core.cli.commands import main
from learned_rounding.tests.nodes.probing import ProbedGraph, saved_path, text, unique


def test_node_and_command_line_report_the_same(comfy, request, sentences):
    graph = ProbedGraph()
    saved = graph.save(graph.quantize(graph.source()[0], rounding="nearest"), unique(request))
    path = saved_path(comfy.queue(graph), saved)
    graph = ProbedGraph()
    node = graph.add("LearnedRoundingInspect", model=f"diffusion_models/{path.name}")
    shown = graph.add("PreviewAny", source=node[0])
    result = comfy.queue(graph)
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        assert main(["inspect", str(path)]) == 0
    assert text(result, node) == text(result, shown) == said.getvalue().strip()
    sentences(said.getvalue())


def test_report_as_markdown_and_image(comfy, request, sentences):
    graph, name = ProbedGraph(), unique(request)
    quantized = graph.quantize(graph.source()[0], "int8_tensorwise", rounding="nearest")
    report = graph.add("LearnedRoundingReport", quantized=quantized[2])
    shown = graph.add("PreviewAny", source=report[0])
    graph.add("SaveImage", images=report[1], filename_prefix=name)
    result = comfy.queue(graph)
    words = text(result, shown)
    sentences(words, numbers=False)
    assert words.count("int8_tensorwise per row | nearest |") == 20
    picture = np.asarray(Image.open(comfy.output_dir / f"{name}_00001_.png"))
    assert picture.shape == (2 * 560, 960, 3)
    assert all((half == (0x1F, 0x6F, 0xD6)).all(-1).sum() > 5000 for half in np.split(picture, 2))  # bars
    assert len(result.outputs[report.id]["images"]) == 1
