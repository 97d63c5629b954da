"""Node Compare in a workflow, against metrics of the outputs of KSampler and SaveImage."""

import math

import numpy as np
import pytest
import torch
from PIL import Image

from learned_rounding.benchmarks.tiny_model.graph import latents, pictures, psnr
from learned_rounding.hosts.server import HOST_DEVICE
from learned_rounding.quant_core.comparison import ssim
from learned_rounding.tests.nodes.probing import ProbedGraph, text, unique

SCALE, SHIFT = 1.5305, 0.0609  # of the latent format of SD3


def tables(markdown: str) -> list[list[list[str]]]:
    """Parse the tables of a Markdown text: rows of cells, the header first."""
    found = []
    for before, line in zip(["", *markdown.splitlines()], markdown.splitlines(), strict=False):
        cells = [cell.strip() for cell in line.strip("| ").split(" | ")]
        if line.startswith("| ") and not line.startswith("| :--"):
            found = [*found[:-1], [*found[-1], cells]] if before.startswith("|") else [*found, [cells]]
    return found


def add_compare(graph, model, other, name, **options):
    """Add a Compare node, a preview of its report, and nodes that save its images."""
    node = graph.compare(model[0], other[0], **options)
    for slot, kind in enumerate(("reference", "compared", "plot")):
        graph.add("SaveImage", images=node[slot], filename_prefix=f"{name}-{kind}")
    return graph.add("PreviewAny", source=node[3]), node


def test_metrics_match_the_outputs_of_ksampler(comfy, host, request):
    graph, name = ProbedGraph(), unique(request)
    model = graph.load()
    quantized = graph.quantize(model[0], "int8_tensorwise", rounding="nearest")
    shown, node = add_compare(graph, model, quantized, name, steps=8)
    for kind, sampled in (("reference-sampled", model), ("compared-sampled", quantized)):
        graph.sample(sampled[0], f"{name}-{kind}", steps=8)
    result = comfy.queue(graph)

    header, first, second, means = tables(text(result, shown))[0]
    assert header == ["prompt", "latent SNR (dB)", "PSNR (dB)", "SSIM"]
    folder = comfy.output_dir
    kinds = "reference-sampled", "compared-sampled"
    expected, actual = ((latents(folder, f"{name}-{kind}")[0] - SHIFT) * SCALE for kind in kinds)
    snr = 10 * math.log10((expected**2).sum() / ((actual - expected) ** 2).sum())
    assert float(first[1]) == pytest.approx(snr, abs=0.1)
    before, after = (pictures(folder, f"{name}-{kind}")[0] for kind in kinds)
    assert float(first[2]) == pytest.approx(psnr(before, after), abs=1)  # the files have 8 bits
    assert float(first[3]) == pytest.approx(ssim(*(torch.from_numpy(each)[None] for each in (before, after))), abs=0.01)
    assert means[0] == "mean"
    assert float(means[1]) == pytest.approx((float(first[1]) + float(second[1])) / 2, abs=0.101)

    models = {row[0]: row[1:] for row in tables(text(result, shown))[1]}
    assert list(models) == ["model", "weight memory", "time per step (s)", "activations"]
    assert all(float(time) > 0 for time in models["time per step (s)"])
    native = host.version != "0.3.75"  # which has no INT8; this pack decodes it there
    quantized = "quantized in 37 of 37 quantized layers" if native else "not quantized"
    assert models["activations"] == ["not quantized", quantized]
    (panel,) = result.outputs[node.id]["learned_rounding_comparison"]
    full, small = (model["weight_bytes"] for model in panel["models"])
    bits = 32 if HOST_DEVICE == "cpu" else 16  # of the reference
    assert 0.8 * bits / 8 < full / small < bits / 8
    assert panel["scores"] == dict(zip(header[1:], means[1:], strict=True))
    assert panel["notes"] == []

    steps = tables(text(result, shown))[2]
    assert steps[0] == ["step", "prompt 1 (dB)", "prompt 2 (dB)"]
    assert [row[0] for row in steps[1:]] == [f"{n}" for n in range(1, 9)]
    assert steps[-1][1:] == [first[1], second[1]]
    assert all(float(cell) > 10 for row in steps[1:] for cell in row[1:])
    assert np.array_equal(pictures(folder, f"{name}-reference")[0], before)
    assert np.array_equal(pictures(folder, f"{name}-compared")[0], after)
    assert len(pictures(folder, f"{name}-reference")) == len(pictures(folder, f"{name}-compared")) == 2
    plot = Image.open(folder / f"{name}-plot_00001_.png")
    assert plot.width == 960
    assert len(np.unique(np.asarray(plot))) > 100
    assert len(result.outputs[node.id]["images"]) == 1


def test_compare_is_an_output_node(comfy):
    graph = ProbedGraph()
    model = graph.load()
    node = graph.compare(model[0], model[0], steps=1, seed=9)
    assert len(comfy.queue(graph).outputs[node.id]["images"]) == 1


def test_a_model_compared_with_itself_is_equal_in_all_metrics(comfy, request):
    graph, name = ProbedGraph(), unique(request)
    model = graph.load()
    shown, node = add_compare(graph, model, model, name, steps=3, seed=5)
    del graph[node.id]["inputs"]["vae"]
    result = comfy.queue(graph)
    scores, _, steps = tables(text(result, shown))
    assert scores[0] == ["prompt", "latent SNR (dB)"]  # no image metrics without a VAE
    assert {cell for row in [*scores[1:], *steps[1:]] for cell in row[1:]} == {"equal"}
    assert pictures(comfy.output_dir, f"{name}-reference").shape[1:] == (64, 64, 3)


@pytest.mark.skipif(HOST_DEVICE != "cpu", reason="a card with FP8 tensor cores does not decode FP8")
def test_decoded_fp8_is_noted(comfy):
    """On a CPU FP8 activations are not quantized, so FP8 looks better than on a card."""
    graph = ProbedGraph()
    model = graph.load()
    node = graph.compare(model[0], graph.quantize(model[0], rounding="nearest")[0], steps=2)
    (panel,) = comfy.queue(graph).outputs[node.id]["learned_rounding_comparison"]
    assert [model["quantized_activations"] for model in panel["models"]] == [0, 0]
    assert panel["models"][1]["quantized_layers"] == 37
    (note,) = panel["notes"]
    assert note.startswith("float8_e4m3fn: decoded on this device")
    assert "INT8" in note


def test_compare_images_takes_the_image_pairs(comfy):
    if "ImageCompare" not in comfy.object_info():
        pytest.skip("this ComfyUI has no Compare Images")
    graph = ProbedGraph()
    model = graph.load()
    node = graph.compare(model[0], graph.quantize(model[0], rounding="nearest")[0], steps=2)
    shown = graph.add("ImageCompare", image_a=node[0], image_b=node[1], compare_view={})
    output = comfy.queue(graph).outputs[shown.id]
    assert len(output["a_images"]) == len(output["b_images"]) == 2
