"""Bad input on the nodes: one clear sentence as a node error, and the server goes on."""

import subprocess

import pytest
import torch
from safetensors.torch import save_file

from learned_rounding.benchmarks.tiny_model.graph import MODEL
from learned_rounding.hosts import HostError
from learned_rounding.tests.nodes.probing import ProbedGraph, probed


def refused(comfy, graph) -> str:
    """What a node says that fails when it is its turn."""
    with pytest.raises(HostError) as caught:
        comfy.queue(graph)
    assert caught.value.kind == "execution"
    assert not list((comfy.base / ".learned_rounding").glob("*"))
    return str(caught.value)


def refused_at_once(comfy, graph, node: str) -> str:
    """What ComfyUI says of a workflow that it does not queue because of this class of node alone."""
    before = comfy.get("/history").keys()
    with pytest.raises(HostError) as caught:
        comfy.queue(graph)
    assert caught.value.kind == "validation"
    assert [error["class_type"] for error in caught.value.node_errors.values()] == [node]
    assert comfy.get("/history").keys() == before
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


@pytest.mark.parametrize(
    "options, sentence",
    [
        ({"rounding": "nearest", "num_iter": 5}, "num_iter has no effect on rounding 'nearest'"),
        ({"rounding": "calibrated"}, "Calibrated rounding needs a calibration"),
        ({"damping": 0.5}, "damping acts on calibrated rounding, which needs a calibration"),
        ({"block_size": 64}, "Block size 64 has no effect"),
    ],
)
def test_choices_of_two_nodes_that_contradict_each_other(comfy, options, sentence):
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


def test_nothing_left_to_quantize(comfy):
    graph = ProbedGraph()
    graph.save(graph.quantize(graph.load()[0], keep="."), "x")
    assert "no layer to quantize" in refused(comfy, graph)


def test_a_model_without_matrices(comfy):
    graph = ProbedGraph()
    graph.save(graph.quantize(graph.source(put(comfy, "flat.safetensors", {"a.weight": torch.zeros(8)}))[0]), "x")
    assert "no layer to quantize" in refused(comfy, graph)


def test_the_wrong_output_says_which_to_use(comfy):
    graph = ProbedGraph()
    quantized = graph.quantize(graph.load()[0])
    graph.add("CLIPTextEncode", text="a", clip=quantized[1])
    graph.add("PreviewAny", source=["4", 0])
    assert "use its MODEL output" in refused(comfy, graph)


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


CONFIGURED = [
    ({"format": "fp9"}, "There is no format 'fp9'"),
    ({"format": "float8_e5m2", "granularity": "row"}, "per tensor, not per row"),
    ({"convrot": "on"}, "ConvRot exists for int8_tensorwise per row"),
    (
        {"format": "int8_tensorwise", "full_precision_matrix_mult": True},
        "full_precision_matrix_mult has no effect on int8_tensorwise",
    ),
    ({"target_size": 1.5}, "target_size has no effect on format float8_e4m3fn"),
    ({"target_error": 0.1}, "target_error has no effect on format float8_e4m3fn"),
    ({"block_formats": True}, "block_formats has no effect on format float8_e4m3fn"),
    ({"format": "measured", "target_size": 1.5, "target_error": 0.1}, "contradict each other"),
    ({"format": "measured", "target_size": -1.0}, "target_size must be a positive number"),
    ({"format": "measured", "convrot": "on"}, "convrot has no effect on format measured"),
    ({"keep": "blocks\n(unclosed"}, "(unclosed"),
    ({"layer_config": '{"a": {"format": "int9"}}'}, "int9"),
    ({"rounding": "nearest", "granularity": "tile"}, "There is no granularity 'tile'"),
]
OPTIONS = [
    ({"min_k": 5, "max_k": 2}, "min_k 5 is larger than max_k 2"),
    ({"calib_samples": 64}, "calib_samples has no effect without bias_correction 'synthetic'"),
    ({"sweeps": 3, "optimizer": "adamw"}, "sweeps has no effect on rounding by an optimizer"),
    ({"top_p": 0.5, "damping": 0.1}, "top_p acts on rounding 'principal' and damping on 'calibrated'"),
    ({"top_p": 7.0}, "top_p must be between"),
    ({"optimizer": "sgd"}, "There is no optimizer 'sgd'"),
    ({"block_size": 100}, "block size must be a power of two"),
]
PREFIXES = ["../escape", "/tmp/escape", "a/../../../escape", "", "folder/"]
GONE = "There is no model file 'diffusion_models/gone.safetensors'"


@pytest.mark.parametrize("options, sentence", CONFIGURED)
def test_what_configure_says_is_checked_before_anything_runs(comfy, options, sentence):
    graph = ProbedGraph()
    graph.save(graph.quantize(graph.source()[0], **options), "x")
    assert sentence in refused_at_once(comfy, graph, "LearnedRoundingConfigure")


@pytest.mark.parametrize("options, sentence", OPTIONS)
def test_what_rounding_options_say_is_checked_before_anything_runs(comfy, options, sentence):
    graph = ProbedGraph()
    recipe = graph.add(
        "LearnedRoundingConfigure", format="int8_blockwise", granularity="auto", preset="auto", seed=0,
        options=graph.add("LearnedRoundingOptions", **options)[0],
    )  # fmt: skip
    graph.save(graph.add("LearnedRoundingQuantize", source=graph.source()[0], recipe=recipe[0]), "x")
    assert sentence in refused_at_once(comfy, graph, "LearnedRoundingOptions")


@pytest.mark.parametrize("prefix", PREFIXES)
def test_a_path_outside_the_folder_is_refused_before_anything_runs(comfy, prefix):
    graph = ProbedGraph()
    graph.save(graph.quantize(graph.source()[0]), prefix)
    assert "no file name inside" in refused_at_once(comfy, graph, "LearnedRoundingSave")
    graph = ProbedGraph()
    clip = graph.add("LearnedRoundingLoadQuantized", model=f"diffusion_models/{MODEL}")[1]
    calibration = graph.add("LearnedRoundingCalibrateText", clip=clip, prompts="a", keep="full", seed=0)[0]
    graph.add("LearnedRoundingSaveCalibration", calibration=calibration, filename_prefix=prefix)
    assert "no file name inside" in refused_at_once(comfy, graph, "LearnedRoundingSaveCalibration")


def test_files_that_are_gone_are_missed_before_anything_runs(comfy):
    graph = ProbedGraph()
    graph.save(graph.quantize(graph.source("diffusion_models/gone.safetensors")[0]), "x")
    assert GONE in refused_at_once(comfy, graph, "LearnedRoundingLoadModel")
    graph = ProbedGraph()
    graph.add("LearnedRoundingInspect", model="diffusion_models/gone.safetensors")
    assert GONE in refused_at_once(comfy, graph, "LearnedRoundingInspect")
    graph = ProbedGraph()
    graph.add(
        "PreviewAny", source=graph.add("LearnedRoundingLoadQuantized", model="diffusion_models/gone.safetensors")[0]
    )
    assert GONE in refused_at_once(comfy, graph, "LearnedRoundingLoadQuantized")


@pytest.mark.parametrize(
    "content, sentence", [(None, "There is no calibration"), (b"no header", "gone.calib.safetensors")]
)
def test_a_calibration_that_cannot_be_read_is_refused_before_anything_runs(comfy, content, sentence):
    path = comfy.output_dir / "calibrations" / "gone.calib.safetensors"
    path.parent.mkdir(exist_ok=True)
    if content:
        path.write_bytes(content)
    graph = ProbedGraph()
    graph.add("PreviewAny", source=graph.add("LearnedRoundingLoadCalibration", file=path.name)[0])
    assert sentence in refused_at_once(comfy, graph, "LearnedRoundingLoadCalibration")
    path.unlink(missing_ok=True)


def test_prompts_that_are_missing_are_missed_before_anything_runs(comfy):
    graph = ProbedGraph()
    clip = graph.add("LearnedRoundingLoadQuantized", model=f"diffusion_models/{MODEL}")[1]
    graph.add("LearnedRoundingCompareText", reference=clip, compared=clip, prompts=" \n ")
    assert "There are no prompts here" in refused_at_once(comfy, graph, "LearnedRoundingCompareText")


def test_what_comes_from_another_node_is_checked_by_the_run(comfy):
    graph = ProbedGraph()
    patterns = graph.add("PrimitiveString", value="(unclosed")
    graph.save(graph.quantize(graph.source()[0], keep=patterns[0]), "x")
    assert "(unclosed" in refused(comfy, graph)
    graph = ProbedGraph()
    options = graph.add(
        "LearnedRoundingOptions", bias_correction="none", calib_samples=graph.add("PrimitiveInt", value=64)[0]
    )
    recipe = graph.add(
        "LearnedRoundingConfigure",
        format="float8_e4m3fn",
        granularity="auto",
        preset="auto",
        seed=0,
        options=options[0],
    )
    graph.save(graph.add("LearnedRoundingQuantize", source=graph.source()[0], recipe=recipe[0]), "x")
    assert "calib_samples has no effect" in refused(comfy, graph)
