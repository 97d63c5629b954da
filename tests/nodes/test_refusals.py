"""Invalid input of nodes: one node error with a clear sentence, and the server keeps running."""

import subprocess

import pytest
import torch
from safetensors.torch import save_file

from learned_rounding.benchmarks.tiny_model.graph import MODEL
from learned_rounding.hosts import HostError
from learned_rounding.tests.conftest import LINKS
from learned_rounding.tests.nodes.probing import ProbedGraph, probed, progress, text


@pytest.fixture
def refused(comfy, sentences):
    """refused(graph): a node raises an error when it is executed."""

    def check(graph) -> None:
        with pytest.raises(HostError) as caught:
            comfy.queue(graph)
        assert caught.value.kind == "execution"
        assert not list((comfy.base / ".learned_rounding").glob("*"))
        sentences(caught)

    return check


@pytest.fixture
def refused_at_once(comfy, sentences):
    """refused_at_once(graph, node): ComfyUI does not queue the workflow, because of this class of node only."""

    def check(graph, node: str) -> None:
        before = comfy.get("/history").keys()
        with pytest.raises(HostError) as caught:
            comfy.queue(graph)
        assert caught.value.kind == "validation"
        (found,) = caught.value.node_errors.values()
        assert found["class_type"] == node
        (error,) = found["errors"]  # one sentence, at one input
        assert error["message"] == f"Invalid {error['extra_info']['input_name']}"
        assert comfy.get("/history").keys() == before
        sentences(caught)

    return check


def put(comfy, name: str, tensors: dict) -> str:
    """A file in the model folder; its name in Load Model."""
    save_file(tensors, comfy.models_dir / "diffusion_models" / name)
    return f"diffusion_models/{name}"


def test_quantized_model_is_rejected(refused):
    graph = ProbedGraph()
    graph.save(graph.quantize(graph.quantize(graph.load()[0])[0]), "twice")
    refused(graph)


def test_quantized_file_is_rejected_with_its_format(comfy, refused):
    tensors = {
        "a.weight": torch.zeros(4, 4, dtype=torch.float8_e4m3fn),
        "a.scale_weight": torch.ones(()),
        "scaled_fp8": torch.zeros(0, dtype=torch.float8_e4m3fn),
    }
    graph = ProbedGraph()
    graph.save(graph.quantize(graph.source(put(comfy, "old_fp8.safetensors", tensors))[0]), "again")
    refused(graph)


def test_layers_of_other_quantizers_are_not_loaded_as_weights(comfy, refused):
    """ComfyUI itself loads such a file without an error, and its model makes noise."""
    tensors = {"a.weight._data": torch.zeros(4, 4, dtype=torch.int8), "a.weight._scale": torch.ones(4, 1)}
    graph = ProbedGraph()
    loaded = graph.add("LearnedRoundingLoadQuantized", model=put(comfy, "quanto.safetensors", tensors))
    graph.probe(loaded[0])
    refused(graph)


def test_requantize_dequantizes_a_quantized_file_first(comfy, refused):
    graph = ProbedGraph()
    saved = graph.save(graph.quantize(graph.source()[0], rounding="nearest"), "to-requantize")
    path = comfy.queue(graph).outputs[saved.id]["text"][0]
    name = f"diffusion_models/{path.rpartition('/')[2]}"
    graph = ProbedGraph()
    graph.save(graph.quantize(graph.source(name)[0], "int8_tensorwise"), "again")
    refused(graph)
    graph = ProbedGraph()
    source = graph.add("LearnedRoundingLoadModel", model=name, requantize=True)
    probe = graph.probe(graph.quantize(source[0], "int8_tensorwise", rounding="nearest")[0])
    assert set(probed(comfy.queue(graph), probe)["layers"].values()) == {"int8"}


def test_full_precision_file_is_not_loaded_as_quantized(refused):
    graph = ProbedGraph()
    graph.sample(graph.load_quantized(MODEL)[0], "plain")
    refused(graph)


def test_missing_output_of_a_file_is_reported(comfy, refused):
    graph = ProbedGraph()
    saved = graph.save(graph.quantize(graph.source()[0], rounding="nearest"), "no-clip")
    path = comfy.queue(graph).outputs[saved.id]["text"][0]
    graph = ProbedGraph()
    clip = graph.load_quantized(path.rpartition("/")[2])[1]
    graph.add("PreviewAny", source=graph.add("CLIPTextEncode", clip=clip, text="a")[0])
    refused(graph)


@pytest.mark.parametrize(
    "options",
    [
        {"rounding": "nearest", "num_iter": 5},
        {"rounding": "calibrated"},
        {"damping": 0.5},
        {"block_size": 64},
    ],
)
def test_contradictory_options_of_two_nodes(options, refused):
    graph = ProbedGraph()
    graph.save(graph.quantize(graph.source()[0], **options), "x")
    refused(graph)


def test_optimizer_with_missing_package(comfy, refused):
    has = [comfy.host.python, "-c", "import prodigyplus"]
    if subprocess.run(has, capture_output=True).returncode == 0:
        pytest.skip("prodigy-plus-schedule-free is installed here")
    graph = ProbedGraph()
    graph.save(graph.quantize(graph.source()[0], rounding="principal", optimizer="prodigy"), "x")
    refused(graph)


UNKNOWN = {"some.0.weight": torch.ones(64, 64)}


def test_unrecognized_model_is_refused_unless_the_switch_is_on(comfy, refused):
    source = put(comfy, "unknown.safetensors", UNKNOWN)
    for general in (True, False):  # the cached result of the first run is not used for the second one
        graph = ProbedGraph()
        quantized = graph.quantize(graph.source(source)[0], general=general)
        graph.add("PreviewAny", source=quantized[3])
        if general:
            assert progress(comfy.queue(graph))[-1]["state"] == "done"
        else:
            refused(graph)


def test_audio_encoder_is_refused(comfy, refused):
    names = ("masked_spec_embed", "feature_projection.projection.weight", "encoder.layers.0.attention.q_proj.weight")
    source = put(comfy, "wav2vec2.safetensors", {name: torch.ones(64, 64) for name in names})
    graph = ProbedGraph()
    graph.save(graph.quantize(graph.source(source)[0]), "x")
    refused(graph)


def test_preset_of_another_family_is_refused(refused):
    graph = ProbedGraph()
    graph.save(graph.quantize(graph.load()[0], preset="wan"), "x")
    refused(graph)


def test_rule_that_matches_no_layer_is_a_warning(comfy, sentences):
    """In the messages to the panel, on the node, and in the report."""
    graph = ProbedGraph()
    quantized = graph.quantize(graph.load()[0], keep="no_such_layer", rounding="nearest", seed=1021)
    report = graph.add("PreviewAny", source=quantized[3])
    result = comfy.queue(graph)
    first, last = progress(result)[0], progress(result)[-1]
    (warning,) = first["warnings"]
    assert last["warnings"] == [warning]
    assert warning in text(result, report)
    assert warning in comfy.log_text()
    sentences(warning)


def test_nothing_left_to_quantize(refused):
    graph = ProbedGraph()
    graph.save(graph.quantize(graph.load()[0], keep="."), "x")
    refused(graph)


def test_model_without_matrices(comfy, refused):
    graph = ProbedGraph()
    graph.save(graph.quantize(graph.source(put(comfy, "flat.safetensors", {"a.weight": torch.zeros(8)}))[0]), "x")
    refused(graph)


def test_wrong_output_names_the_right_one(refused):
    graph = ProbedGraph()
    quantized = graph.quantize(graph.load()[0])
    graph.add("CLIPTextEncode", text="a", clip=quantized[1])
    graph.add("PreviewAny", source=["4", 0])
    refused(graph)


def test_damaged_file(comfy, refused):
    path = comfy.models_dir / "diffusion_models" / "cut.safetensors"
    path.write_bytes((comfy.models_dir / "diffusion_models" / MODEL).read_bytes()[:100_000])
    graph = ProbedGraph()
    graph.save(graph.quantize(graph.source("diffusion_models/cut.safetensors")[0]), "x")
    refused(graph)


def test_server_runs_after_errors(comfy):
    graph = ProbedGraph()
    probe = graph.probe(graph.quantize(graph.load()[0])[0])
    assert probed(comfy.queue(graph), probe)["layers"]


CONFIGURED = [
    {"format": "fp9"},
    {"format": "float8_e5m2", "granularity": "row"},
    {"convrot": "on"},
    {"format": "int8_tensorwise", "full_precision_matrix_mult": True},
    {"target_size": 1.5},
    {"target_error": 0.1},
    {"block_formats": True},
    {"format": "measured", "target_size": 1.5, "target_error": 0.1},
    {"format": "measured", "target_size": -1.0},
    {"format": "measured", "convrot": "on"},
    {"keep": "blocks\n(unclosed"},
    {"layer_config": '{"a": {"format": "int9"}}'},
    {"rounding": "nearest", "granularity": "tile"},
]
OPTIONS = [
    {"min_k": 5, "max_k": 2},
    {"calib_samples": 64},
    {"sweeps": 3, "beam_width": 17},
    {"top_p": 0.5, "damping": 0.1},
    {"top_p": 7.0},
    {"optimizer": "sgd"},
    {"block_size": 100},
]
PREFIXES = ["../escape", "/tmp/escape", "a/../../../escape", "", "folder/"]


@pytest.mark.parametrize("options", CONFIGURED)
def test_configure_options_are_validated_before_execution(options, refused_at_once):
    graph = ProbedGraph()
    graph.save(graph.quantize(graph.source()[0], **options), "x")
    refused_at_once(graph, "LearnedRoundingConfigure")


@pytest.mark.parametrize("options", OPTIONS)
def test_rounding_options_are_validated_before_execution(options, refused_at_once):
    graph = ProbedGraph()
    recipe = graph.add(
        "LearnedRoundingConfigure", format="int8_blockwise", granularity="auto", preset="auto", seed=0,
        options=graph.add("LearnedRoundingOptions", **options)[0],
    )  # fmt: skip
    graph.save(graph.add("LearnedRoundingQuantize", source=graph.source()[0], recipe=recipe[0]), "x")
    refused_at_once(graph, "LearnedRoundingOptions")


def test_options_of_gptq_beside_an_optimizer_are_for_the_rounding_that_has_both(refused):
    """Rounding Options takes them together: only Configure Quantization has the rounding."""
    graph = ProbedGraph()
    quantized = graph.quantize(graph.load()[0], rounding="auto", optimizer="adamw", sweeps=2, beam_width=2)
    graph.save(quantized, "x")
    refused(graph)


@pytest.mark.parametrize("prefix", PREFIXES)
def test_path_outside_the_folder_is_rejected_before_execution(prefix, refused_at_once):
    graph = ProbedGraph()
    graph.save(graph.quantize(graph.source()[0]), prefix)
    refused_at_once(graph, "LearnedRoundingSave")
    graph = ProbedGraph()
    clip = graph.add("LearnedRoundingLoadQuantized", model=f"diffusion_models/{MODEL}")[1]
    calibration = graph.add("LearnedRoundingCalibrateText", clip=clip, prompts="a", keep="full", seed=0)[0]
    graph.add("LearnedRoundingSaveCalibration", calibration=calibration, filename_prefix=prefix)
    refused_at_once(graph, "LearnedRoundingSaveCalibration")


def test_the_wrong_input_is_the_one_that_is_marked(comfy):
    """Of two that contradict each other the later one."""

    def marked(**options) -> str:
        graph = ProbedGraph()
        graph.save(graph.quantize(graph.source()[0], **options), "x")
        with pytest.raises(HostError) as caught:
            comfy.queue(graph)
        ((error,),) = (found["errors"] for found in caught.value.node_errors.values())
        return error["extra_info"]["input_name"]

    assert marked(keep="(unclosed") == marked(keep="(unclosed", layer_config="no JSON") == "keep"
    assert marked(layer_config="no JSON") == marked(layer_config='{"(unclosed": "fp8"}') == "layer_config"
    assert marked(format="nvfp4", granularity="row") == "granularity"
    assert marked(format="float8_e4m3fn", target_size=1.0) == "target_size"
    assert marked(format="measured", target_size=1.0, layer_config='{"a": "fp8"}') == "layer_config"
    assert marked(optimizer="adamw", top_p=0.5, beam_width=4) == "beam_width"


def test_lists_without_files_say_so_and_what_to_do(server_factory, sentences):
    server = server_factory(links=LINKS)
    choices = {"LoadModel": "model", "LoadQuantized": "model", "Inspect": "model", "LoadCalibration": "file"}
    for name, input_name in choices.items():
        kind, *options = server.object_info()[f"LearnedRounding{name}"]["input"]["required"][input_name]
        assert (kind if isinstance(kind, list) else options[0]["options"]) == ["no file found"]
        graph = ProbedGraph()
        node = graph.add(f"LearnedRounding{name}", **{input_name: "no file found"})
        graph.add("PreviewAny", source=node[0])
        with pytest.raises(HostError) as caught:
            server.queue(graph)
        sentences(caught)


def test_missing_files_are_reported_before_execution(refused_at_once):
    graph = ProbedGraph()
    graph.save(graph.quantize(graph.source("diffusion_models/gone.safetensors")[0]), "x")
    refused_at_once(graph, "LearnedRoundingLoadModel")
    graph = ProbedGraph()
    graph.add("LearnedRoundingInspect", model="diffusion_models/gone.safetensors")
    refused_at_once(graph, "LearnedRoundingInspect")
    graph = ProbedGraph()
    graph.add(
        "PreviewAny", source=graph.add("LearnedRoundingLoadQuantized", model="diffusion_models/gone.safetensors")[0]
    )
    refused_at_once(graph, "LearnedRoundingLoadQuantized")


@pytest.mark.parametrize("content", [None, b"no header"])
def test_unreadable_calibration_is_rejected_before_execution(comfy, content, refused_at_once):
    path = comfy.output_dir / "calibrations" / "gone.calib.safetensors"
    path.parent.mkdir(exist_ok=True)
    if content:
        path.write_bytes(content)
    graph = ProbedGraph()
    graph.add("PreviewAny", source=graph.add("LearnedRoundingLoadCalibration", file=path.name)[0])
    refused_at_once(graph, "LearnedRoundingLoadCalibration")
    path.unlink(missing_ok=True)


def test_missing_prompts_are_reported_before_execution(refused_at_once):
    graph = ProbedGraph()
    clip = graph.add("LearnedRoundingLoadQuantized", model=f"diffusion_models/{MODEL}")[1]
    graph.add("LearnedRoundingCompareText", reference=clip, compared=clip, prompts=" \n ")
    refused_at_once(graph, "LearnedRoundingCompareText")


def test_connected_values_are_validated_at_execution(refused):
    graph = ProbedGraph()
    patterns = graph.add("PrimitiveString", value="(unclosed")
    graph.save(graph.quantize(graph.source()[0], keep=patterns[0]), "x")
    refused(graph)
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
    refused(graph)
