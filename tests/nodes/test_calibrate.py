"""Node Calibrate in a workflow: sampling, statistics, and the quantization that uses them."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from learned_rounding.benchmarks.tiny_model.evaluate import merge_lora
from learned_rounding.benchmarks.tiny_model.graph import LORA, MODEL, latents, pictures, psnr
from learned_rounding.hosts import HostError, HostInterrupted
from learned_rounding.hosts.server import HOST_DEVICE
from learned_rounding.quant_core import Recipe, quantize_file
from learned_rounding.quant_core.calibration import CalibrationFile
from learned_rounding.quant_core.output import verify_file
from learned_rounding.quant_core.sources import SafetensorsFile
from learned_rounding.tests.nodes.probing import ProbedGraph, saved_path, text, unique

# A GPU would also quantize the activations, a CPU does not.
WEIGHTS_ONLY = {"full_precision_matrix_mult": True}


def temporary_files(comfy):
    folder = comfy.base / "temp"
    return {path.name for path in folder.glob("learned_rounding*")} if folder.exists() else set()


def saved_calibration(graph, calibration, name):
    return graph.add("LearnedRoundingSaveCalibration", calibration=calibration[0], filename_prefix=name)


def error(folder, full, other):
    """Root mean squared error of the sampled latents."""
    return float(np.sqrt(np.mean((latents(folder, full) - latents(folder, other)) ** 2)))


def test_calibrate_quantize_and_sample_in_one_graph(comfy, request, sentences):
    graph, name = ProbedGraph(), unique(request)
    model = graph.load()
    graph.sample(model[0], f"{name}-before")
    calibration = graph.calibrate(model[0], samples=4, steps=10)
    shown = graph.add("PreviewAny", source=calibration[2])
    for rounding in ("nearest", "auto"):
        known = {"calibration": calibration[0]} if rounding == "auto" else {}
        quantized = graph.quantize(model[0], rounding=rounding, **WEIGHTS_ONLY, **known)
        graph.sample(quantized[0], f"{name}-{rounding}", seed=7)
        report = graph.add("PreviewAny", source=quantized[3])
    saved = graph.save(graph.quantize(model[0], calibration=calibration[0]), name)
    graph.sample(model[0], f"{name}-full", seed=7)
    result = comfy.queue(graph)

    after = ProbedGraph()
    after.sample(after.load()[0], f"{name}-after", steps=5)  # other steps, so that ComfyUI does not reuse the result
    comfy.queue(after)
    again = ProbedGraph(after)
    again.sample(again.load()[0], f"{name}-again")
    comfy.queue(again)
    folder = comfy.output_dir
    assert np.array_equal(latents(folder, f"{name}-before"), latents(folder, f"{name}-again"))  # hooks are removed
    assert error(folder, f"{name}-full", f"{name}-auto") < 0.75 * error(folder, f"{name}-full", f"{name}-nearest")
    sentences(text(result, report), text(result, shown), numbers=False)
    shown_on_node = b"".join(event.data for event in result.of("binary"))
    assert text(result, shown).encode() in shown_on_node
    path = saved_path(result, saved)
    assert not verify_file(path).problems
    assert any(key.endswith(".input_scale") for key in load_file(path))
    events = [event.data for event in result.of("learned_rounding.progress") if event.data["node"] == calibration.id]
    assert [event["seq"] for event in events] == list(range(len(events)))
    assert [event["done"] for event in events[:-1]] == list(range(2 * 4 * 10 + 1))  # prompts × samples × steps, from 0
    assert {(event["unit"], event["total"]) for event in events[:-1]} == {("steps", 80)}
    assert events[-1]["state"] == "calibrated"
    assert events[-1]["layers"] == events[0]["layers"] > 30
    assert len(result.outputs[calibration.id]["images"]) == 2 * 4  # prompts × samples
    with pytest.raises(AssertionError):
        np.testing.assert_array_equal(pictures(folder, f"{name}-auto"), pictures(folder, f"{name}-nearest"))


@pytest.mark.parametrize("keep", ["full", "compact"])
def test_a_saved_calibration_gives_the_same_file_in_a_workflow_and_in_python(comfy, request, keep, tmp_path):
    name, others = unique(request), r"joint_blocks\.[023]"  # one block is quantized
    recipe = Recipe(format="int8_tensorwise", convrot=True, keep=(others,))
    graph = ProbedGraph()
    model = graph.load()
    calibration = graph.calibrate(model[0], keep=keep, samples=2, seed=201, steps=3)
    saved = saved_calibration(graph, calibration, name)
    path = saved_path(comfy.queue(graph), saved)
    assert path.is_relative_to(comfy.output_dir / "calibrations")
    with CalibrationFile(path) as file:
        assert file.provenance["runs"] == 4
        assert file.provenance["keep"] == keep
        assert file.provenance["steps"] == 3
        assert len(file.provenance["prompts"]) == 2
        assert min(file.tokens(layer)[0] for layer in file.layers) > 0
        assert len(file.layers) > 30
        quantize_file(
            comfy.models_dir / "diffusion_models" / MODEL, tmp_path / "q", recipe, calibration=file, device=HOST_DEVICE
        )
    assert not verify_file(tmp_path / "q").problems
    again = ProbedGraph()
    loaded = again.add("LearnedRoundingLoadCalibration", file=path.name)
    source = again.source()
    quantized = again.quantize(source[0], "int8_tensorwise", convrot="on", keep=others, calibration=loaded[0])
    made = again.save(quantized, name)
    assert saved_path(comfy.queue(again), made).read_bytes() == (tmp_path / "q").read_bytes()


def test_formats_are_measured_by_what_hurts(comfy, request, sentences):
    """Calibrate with sensitivities → format measured → sample, in one graph, in no more bytes than INT8 with ConvRot takes."""
    graph, name = ProbedGraph(), unique(request)
    model = graph.load()
    calibration = graph.calibrate(model[0], samples=4, steps=10, sensitivity=True)
    shown = graph.add("PreviewAny", source=calibration[2])
    usual = graph.quantize(model[0], format="int8_tensorwise", convrot="on", calibration=calibration[0])
    saved = {"usual": graph.save(usual, f"{name}-usual")}
    result = comfy.queue(graph)
    sentences(text(result, shown), numbers=False)
    with SafetensorsFile(saved_path(result, saved["usual"])) as file:
        size = sum(info.nbytes for info in file.tensors.values())

    graph = ProbedGraph(graph)
    quantized = graph.quantize(model[0], format="measured", target_size=size / 1e9, calibration=calibration[0])
    report = graph.add("PreviewAny", source=quantized[3])
    saved["measured"] = graph.save(quantized, f"{name}-measured")
    seeds = (7, 8, 9)  # the error of a single one is not yet that of the model
    for tag, chosen in (("full", model), ("usual", usual), ("measured", quantized)):
        for seed in seeds:
            graph.sample(chosen[0], f"{name}-{tag}-{seed}", seed=seed)
    result = comfy.queue(graph)
    events = [event.data for event in result.of("learned_rounding.progress") if event.data["node"] == quantized.id]
    measuring = [event for event in events if event["state"] == "measuring"]
    assert len(measuring) == measuring[0]["total"]
    assert events[len(measuring)]["state"] == "start"
    sentences(text(result, report), numbers=False)
    path = saved_path(result, saved["measured"])
    assert not verify_file(path).problems
    with SafetensorsFile(path) as file:
        assert sum(info.nbytes for info in file.tensors.values()) <= size
    errors = {
        tag: sum(error(comfy.output_dir, f"{name}-full-{seed}", f"{name}-{tag}-{seed}") for seed in seeds)
        for tag in ("usual", "measured")
    }
    assert errors["measured"] < 1.25 * errors["usual"], errors


def test_an_interrupted_calibration_leaves_no_files_and_no_hooks(comfy, request):
    name, before = unique(request), temporary_files(comfy)
    plain = ProbedGraph()
    plain.sample(plain.load()[0], f"{name}-before", seed=11)
    comfy.queue(plain)
    graph = ProbedGraph()
    calibration = graph.calibrate(graph.load()[0], seed=301, samples=50)
    saved_calibration(graph, calibration, name)

    def stop(event):
        if event.type == "progress":
            comfy.interrupt()

    with pytest.raises(HostInterrupted):
        comfy.queue(graph, on_event=stop)
    assert temporary_files(comfy) <= before
    assert not list((comfy.output_dir / "calibrations").glob(f"{name}*"))
    plain = ProbedGraph()
    model = plain.load()
    plain.sample(model[0], f"{name}-other", seed=12)
    plain.sample(model[0], f"{name}-after", seed=11)
    comfy.queue(plain)
    assert np.array_equal(latents(comfy.output_dir, f"{name}-before"), latents(comfy.output_dir, f"{name}-after"))


def test_a_continued_calibration_has_the_tokens_of_both(comfy, request):
    name, graph = unique(request), ProbedGraph()
    model = graph.load()
    first = graph.calibrate(model[0], seed=401, steps=5)
    second = graph.calibrate(model[0], seed=402, steps=5)
    both = graph.calibrate(model[0], seed=402, steps=5, calibration=first[0])
    nodes = [
        saved_calibration(graph, calibration, f"{name}-{number}")
        for number, calibration in enumerate((first, second, both))
    ]
    result = comfy.queue(graph)
    tokens = []
    for node in nodes:
        with CalibrationFile(saved_path(result, node)) as file:
            tokens.append(sum(file.tokens(next(iter(file.layers)))))
    assert tokens[0] == tokens[1]
    assert tokens[2] == 2 * tokens[0]


def test_a_lora_is_applied_during_calibration(comfy, request):
    name, graph = unique(request), ProbedGraph()
    model = graph.load()
    patched = graph.lora(model[0])
    found = {}
    for kind, node in (("plain", model), ("lora", patched)):
        found[kind] = saved_calibration(graph, graph.calibrate(node[0], seed=501, steps=10), f"{name}-{kind}")
    known = graph.calibrate(patched[0], seed=501, steps=10)[0]
    quantized = graph.quantize(patched[0], calibration=known, **WEIGHTS_ONLY)
    graph.sample(patched[0], f"{name}-full", seed=7)
    graph.sample(quantized[0], f"{name}-quantized", seed=7)
    result = comfy.queue(graph)
    hessians = {}
    for kind, node in found.items():
        with CalibrationFile(saved_path(result, node)) as file:
            hessians[kind] = file.layer_statistics("joint_blocks.2.x_block.mlp.fc1").hessian
    assert not torch.equal(hessians["plain"].rms, hessians["lora"].rms)
    full, ours = (pictures(comfy.output_dir, f"{name}-{kind}") for kind in ("full", "quantized"))
    assert psnr(full, ours) > 38


def test_a_calibration_serves_a_fine_tune_and_no_other_architecture(comfy, request, slow_source, sentences):
    name, models = unique(request), comfy.models_dir / "diffusion_models"
    tuned = merge_lora(
        {key: tensor.float() for key, tensor in load_file(models / MODEL).items()},
        load_file(comfy.models_dir / "loras" / LORA),
    )
    save_file(
        {key: tensor.to(torch.bfloat16).contiguous() for key, tensor in tuned.items()}, models / f"{name}.safetensors"
    )
    graph = ProbedGraph()
    calibration = graph.calibrate(graph.load()[0], samples=4, seed=601, steps=10)
    fine_tune = graph.load(f"{name}.safetensors")
    graph.sample(fine_tune[0], f"{name}-full", seed=7)
    for rounding, known in (("nearest", None), ("auto", calibration[0])):
        quantized = graph.quantize(fine_tune[0], rounding=rounding, calibration=known, **WEIGHTS_ONLY)
        graph.sample(quantized[0], f"{name}-{rounding}", seed=7)
    comfy.queue(graph)
    folder = comfy.output_dir
    assert error(folder, f"{name}-full", f"{name}-auto") < 0.85 * error(folder, f"{name}-full", f"{name}-nearest")
    other = ProbedGraph()
    calibration = other.calibrate(other.load()[0], samples=4, seed=601, steps=10)
    other.save(other.quantize(other.source(slow_source)[0], calibration=calibration[0], general=True), name)
    with sentences.raises(HostError):
        comfy.queue(other)


def test_what_cannot_be_calibrated_says_why(comfy, sentences):
    graph = ProbedGraph()
    model = graph.load()
    quantized = graph.quantize(model[0])
    graph.add("PreviewAny", source=graph.calibrate(quantized[0], seed=801, steps=2)[2])
    with sentences.raises(HostError):
        comfy.queue(graph)


def test_a_full_calibration_cannot_be_continued_in_compact_form(comfy, sentences):
    graph = ProbedGraph()
    full = graph.calibrate(graph.load()[0], seed=802, steps=2)
    graph.add(
        "PreviewAny", source=graph.calibrate(graph.load()[0], seed=803, steps=2, keep="compact", calibration=full[0])[2]
    )
    with sentences.raises(HostError):
        comfy.queue(graph)
