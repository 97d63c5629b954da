"""LoRAs before and after quantization in graphs with the tiny model, and calibrated files as the graph runs them."""

import numpy as np
import pytest
from safetensors import safe_open

from learned_rounding.benchmarks.tiny_model.graph import latents, pictures, psnr
from learned_rounding.quant_core.output import verify_file
from learned_rounding.tests.nodes.probing import (
    ProbedGraph,
    case_name,
    loads,
    probed,
    saved_path,
    takes_layouts,
    unique,
)


@pytest.mark.parametrize(
    "format, smoothing", [("asym_w4a8_int8", False), ("nvfp4", False), ("nvfp4", True), ("mxfp8", False)]
)
def test_calibrated_file_samples_bit_for_bit_as_in_the_graph(comfy, request, format, smoothing):
    """Calibrated in the graph, also with smoothed layers; with a LoRA the file samples as the model in the graph does."""
    if smoothing and not takes_layouts(comfy.host):
        pytest.skip(f"ComfyUI {comfy.host.version} cannot load smoothed layers; this pack decodes them")
    graph, name = ProbedGraph(), unique(request)
    model = graph.load()
    calibration = graph.calibrate(model[0], samples=2, steps=4, keep="compact", tokens=64)
    options = {"keep": r"joint_blocks\.[023]", **({"smoothing": True} if smoothing else {})}  # one block is quantized
    quantized = graph.quantize(model[0], format, rounding="calibrated", calibration=calibration[0], **options)
    graph.sample(graph.lora(model[0])[0], f"{name}-reference")
    graph.sample(quantized[0], f"{name}-graph")
    graph.sample(graph.lora(quantized[0])[0], f"{name}-graph-lora")
    saved = graph.save(quantized, name)
    path = saved_path(comfy.queue(graph), saved)
    assert not verify_file(path).problems
    with safe_open(path, "pt") as opened:
        assert smoothing is any(key.endswith(".pre_quant_scale") for key in opened.keys())
    again = ProbedGraph()
    loaded = (again.load if loads(comfy.host, format) else again.load_quantized)(path.name)
    again.sample(loaded[0], f"{name}-file")
    again.sample(again.lora(loaded[0])[0], f"{name}-file-lora")
    comfy.queue(again)
    for kind in ("", "-lora"):
        assert np.array_equal(*(latents(comfy.output_dir, f"{name}-{place}{kind}") for place in ("graph", "file")))
    reference, before, lora = (
        pictures(comfy.output_dir, f"{name}-{kind}") for kind in ("reference", "graph", "graph-lora")
    )
    assert psnr(reference, lora) > psnr(reference, before) + 3


@pytest.mark.parametrize("format", ["int8_tensorwise", "asym_w4a8_int8", "nvfp4", "mxfp8"])
def test_lora_before_quantization_is_applied_and_the_source_is_unchanged(comfy, request, format):
    graph, name = ProbedGraph(), unique(request)
    model = graph.load()
    patched = graph.lora(model[0])
    quantized = graph.quantize(patched[0], format)
    graph.sample(model[0], f"{name}-plain")
    graph.sample(patched[0], f"{name}-lora")
    graph.sample(quantized[0], f"{name}-quantized")
    probe = graph.probe(quantized[0])
    result = comfy.queue(graph)
    assert probed(result, probe)["patches"] == 0
    plain, lora, ours = (pictures(comfy.output_dir, f"{name}-{kind}") for kind in ("plain", "lora", "quantized"))
    assert psnr(lora, ours) > psnr(plain, lora) + 6
    assert psnr(lora, ours) > psnr(plain, ours) + 6
    after = ProbedGraph()
    after.sample(after.lora(after.load()[0])[0], f"{name}-again")
    comfy.queue(after)
    assert np.array_equal(latents(comfy.output_dir, f"{name}-lora"), latents(comfy.output_dir, f"{name}-again"))


@pytest.mark.parametrize(
    "format, options",
    [
        ("float8_e4m3fn", {}),
        ("int8_tensorwise", {}),
        ("int8_tensorwise", {"convrot": "on"}),
        ("float8_e4m3fn_blockwise", {}),
        ("asym_w4a8_int8", {}),
        ("asym_w4a8_int8", {"bits": 6}),
        ("nvfp4", {}),
        ("mxfp8", {}),
    ],
    ids=case_name,
)
def test_lora_after_quantization_is_applied_and_removed(comfy, request, format, options):
    graph, name = ProbedGraph(), unique(request)
    model = graph.load()
    quantized = graph.quantize(model[0], format, **options)
    graph.sample(quantized[0], f"{name}-before")
    graph.sample(graph.lora(model[0])[0], f"{name}-reference")
    graph.sample(graph.lora(quantized[0])[0], f"{name}-lora")
    comfy.queue(graph)
    after = ProbedGraph(graph)
    after.sample(
        quantized[0], f"{name}-after", steps=5
    )  # other steps, so that it is sampled again, and then again as before
    comfy.queue(after)
    before, reference, lora = (pictures(comfy.output_dir, f"{name}-{kind}") for kind in ("before", "reference", "lora"))
    assert psnr(reference, lora) > psnr(reference, before) + 3
    final = ProbedGraph()
    final.sample(final.quantize(final.load()[0], format, **options)[0], f"{name}-final")
    comfy.queue(final)
    assert np.array_equal(latents(comfy.output_dir, f"{name}-before"), latents(comfy.output_dir, f"{name}-final"))
