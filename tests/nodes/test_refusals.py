"""Bad input on the nodes: one clear sentence as a node error, and the server goes on."""

import subprocess

import pytest
import torch
from safetensors.torch import save_file

from learned_rounding.benchmarks.tiny_model.graph import MODEL
from learned_rounding.hosts import HostError
from learned_rounding.tests.nodes.probing import ProbedGraph, probed


def refused(comfy, graph) -> str:
    with pytest.raises(HostError) as caught:
        comfy.queue(graph)
    assert not list((comfy.base / ".learned_rounding").glob("*"))
    return str(caught.value)


def put(comfy, name: str, tensors: dict) -> str:
    """A file in the model folder, and how Load Model names it."""
    save_file(tensors, comfy.models_dir / "diffusion_models" / name)
    return f"diffusion_models/{name}"


def test_a_quantized_model_is_refused_by_name(comfy):
    graph = ProbedGraph()
    graph.save(graph.quantize(graph.quantize(graph.load()[0])[0]), "twice")
    assert "quantized already" in refused(comfy, graph)


def test_a_quantized_file_is_refused_by_the_name_of_its_format(comfy):
    tensors = {
        "a.weight": torch.zeros(4, 4, dtype=torch.float8_e4m3fn),
        "a.scale_weight": torch.ones(()),
        "scaled_fp8": torch.zeros(0, dtype=torch.float8_e4m3fn),
    }
    graph = ProbedGraph()
    graph.save(graph.quantize(graph.source(put(comfy, "old_fp8.safetensors", tensors))[0]), "again")
    assert "scaled fp8" in refused(comfy, graph)


def test_a_quantized_file_is_decoded_first_where_that_is_asked_for(comfy):
    graph = ProbedGraph()
    saved = graph.save(graph.quantize(graph.source()[0], rounding="nearest"), "to-requantize")
    path = comfy.queue(graph).outputs[saved.id]["text"][0]
    name = f"diffusion_models/{path.rpartition('/')[2]}"
    graph = ProbedGraph()
    graph.save(graph.quantize(graph.source(name)[0], "int8_tensorwise"), "again")
    assert "quantized already" in refused(comfy, graph)
    graph = ProbedGraph()
    source = graph.add("LearnedRoundingLoadModel", model=name, requantize=True)
    probe = graph.probe(graph.quantize(source[0], "int8_tensorwise", rounding="nearest")[0])
    assert set(probed(comfy.queue(graph), probe)["layers"].values()) == {"int8"}


def test_a_full_precision_file_is_not_loaded_as_a_quantized_one(comfy):
    graph = ProbedGraph()
    graph.sample(graph.load_quantized(MODEL)[0], "plain")
    assert "holds no quantized layers" in refused(comfy, graph)


def test_the_output_that_a_file_does_not_have(comfy):
    graph = ProbedGraph()
    saved = graph.save(graph.quantize(graph.source()[0], rounding="nearest"), "no-clip")
    path = comfy.queue(graph).outputs[saved.id]["text"][0]
    graph = ProbedGraph()
    clip = graph.load_quantized(path.rpartition("/")[2])[1]
    graph.add("PreviewAny", source=graph.add("CLIPTextEncode", clip=clip, text="a")[0])
    assert "is a diffusion model" in refused(comfy, graph)


def test_a_granularity_the_format_does_not_have(comfy):
    graph = ProbedGraph()
    graph.save(graph.quantize(graph.source()[0], "float8_e5m2", "row"), "row")
    assert "per tensor, not per row" in refused(comfy, graph)


def test_an_option_without_effect(comfy):
    graph = ProbedGraph()
    graph.save(graph.quantize(graph.source()[0], "int8_tensorwise", full_precision_matrix_mult=True), "x")
    assert "no effect" in refused(comfy, graph)


@pytest.mark.parametrize(
    "options, sentence",
    [
        ({"rounding": "nearest", "num_iter": 5}, "num_iter has no effect on rounding 'nearest'"),
        ({"rounding": "calibrated"}, "Calibrated rounding needs a calibration"),
        ({"damping": 0.5}, "damping acts on calibrated rounding, which needs a calibration"),
        ({"convrot": "on"}, "ConvRot exists for int8_tensorwise per row"),
        ({"block_size": 64}, "Block size 64 has no effect"),
    ],
)
def test_choices_that_contradict_each_other(comfy, options, sentence):
    graph = ProbedGraph()
    graph.save(graph.quantize(graph.source()[0], **options), "x")
    assert sentence in refused(comfy, graph)


def test_an_optimizer_whose_package_is_missing(comfy):
    has = [comfy.host.python, "-c", "import prodigyplus"]
    if subprocess.run(has, capture_output=True).returncode == 0:
        pytest.skip("prodigy-plus-schedule-free is installed here")
    graph = ProbedGraph()
    graph.save(graph.quantize(graph.source()[0], rounding="principal", optimizer="prodigy"), "x")
    assert "pip install prodigy-plus-schedule-free" in refused(comfy, graph)


def test_a_keep_pattern_that_is_no_regular_expression(comfy):
    graph = ProbedGraph()
    graph.save(graph.quantize(graph.source()[0], keep="blocks\n(unclosed"), "x")
    assert "(unclosed" in refused(comfy, graph)


def test_nothing_left_to_quantize(comfy):
    graph = ProbedGraph()
    graph.save(graph.quantize(graph.load()[0], keep="."), "x")
    assert "no layer to quantize" in refused(comfy, graph)


def test_a_model_without_matrices(comfy):
    graph = ProbedGraph()
    graph.save(graph.quantize(graph.source(put(comfy, "flat.safetensors", {"a.weight": torch.zeros(8)}))[0]), "x")
    assert "no layer to quantize" in refused(comfy, graph)


@pytest.mark.parametrize("prefix", ["../escape", "/tmp/escape", "a/../../../escape", "", "folder/"])
def test_a_path_outside_the_folder(comfy, prefix, tmp_path):
    graph = ProbedGraph()
    graph.save(graph.quantize(graph.source()[0]), prefix)
    assert "no file name inside" in refused(comfy, graph)


def test_the_wrong_output_says_which_to_use(comfy):
    graph = ProbedGraph()
    quantized = graph.quantize(graph.load()[0])
    graph.add("CLIPTextEncode", text="a", clip=quantized[1])
    graph.add("PreviewAny", source=["4", 0])
    assert "use its MODEL output" in refused(comfy, graph)


def test_a_file_that_is_gone(comfy):
    graph = ProbedGraph()
    graph.save(graph.quantize(graph.source("diffusion_models/gone.safetensors")[0]), "x")
    assert "gone.safetensors" in refused(comfy, graph)


def test_a_damaged_file(comfy):
    path = comfy.models_dir / "diffusion_models" / "cut.safetensors"
    path.write_bytes((comfy.models_dir / "diffusion_models" / MODEL).read_bytes()[:100_000])
    graph = ProbedGraph()
    graph.save(graph.quantize(graph.source("diffusion_models/cut.safetensors")[0]), "x")
    assert "truncated" in refused(comfy, graph)


def test_the_server_goes_on(comfy):
    graph = ProbedGraph()
    probe = graph.probe(graph.quantize(graph.load()[0])[0])
    assert probed(comfy.queue(graph), probe)["layers"]


@pytest.mark.parametrize(
    "options, prefix, sentence",
    [
        ({"format": "float8_e5m2", "granularity": "row"}, "x", "per tensor, not per row"),
        ({"convrot": "on"}, "x", "ConvRot exists for int8_tensorwise per row"),
        ({"keep": "(unclosed"}, "x", "(unclosed"),
        ({"layer_config": '{"a": {"format": "int9"}}'}, "x", "int9"),
        ({"format": "fp9"}, "x", "There is no format 'fp9'"),
        ({}, "../escape", "no file name inside"),
    ],
)
def test_what_the_widgets_say_is_checked_before_anything_runs(comfy, options, prefix, sentence):
    graph = ProbedGraph()
    graph.save(graph.quantize(graph.source()[0], **options), prefix)
    with pytest.raises(HostError) as caught:
        comfy.queue(graph)
    assert caught.value.kind == "validation" and sentence in str(caught.value)


def test_what_comes_from_another_node_is_checked_by_the_run(comfy):
    graph = ProbedGraph()
    patterns = graph.add("PrimitiveString", value="(unclosed")
    graph.save(graph.quantize(graph.source()[0], keep=patterns[0]), "x")
    with pytest.raises(HostError) as caught:
        comfy.queue(graph)
    assert caught.value.kind == "execution" and "(unclosed" in str(caught.value)
