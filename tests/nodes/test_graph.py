"""Graphs with stock nodes and this pack's nodes, on running servers with the tiny model."""

import json

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from learned_rounding.benchmarks.tiny_model.graph import MODEL, STEPS, latents, pictures, psnr
from learned_rounding.benchmarks.tiny_model.place import prompt_names, read_conditioning
from learned_rounding.hosts.server import HOST_DEVICE
from learned_rounding.hosts.workflows import Node
from learned_rounding.quant_core import FORMATS, Recipe, quantize_file
from learned_rounding.quant_core.formats import E2M1, E4M3, E5M2, INT4, INT8, make_codec
from learned_rounding.quant_core.output import verify_file
from learned_rounding.tests.nodes.probing import (
    CASES,
    ProbedGraph,
    case_name,
    loads,
    probed,
    progress,
    saved_path,
    takes_layouts,
    unique,
)

# PSNR in dB against the unquantized model: below the worst image with round to nearest (benchmarks/README.md).
FLOOR = {E4M3: 38.0, E5M2: 32.0, INT8: 27.0, E2M1: 27.0, INT4: 16.0}
FLOOR_FP8_INPUTS = 24.0  # FP8 activations too; ComfyUI's own FP8 per tensor leaves them unquantized on a CPU
CAPABILITY = torch.cuda.get_device_capability() if HOST_DEVICE == "cuda" else (0, 0)


def floor(host, format: str) -> float:
    entry = FORMATS[format]
    # This pack's layouts quantize activations on every device, ComfyUI's own on cards that multiply such values.
    quantized = entry.stock_since is None or make_codec(format).quantizes_activations(CAPABILITY)
    return FLOOR_FP8_INPUTS if entry.elements == E4M3 and loads(host, format) and quantized else FLOOR[entry.elements]


def casts_to_fp8(host, format: str) -> bool:
    """Whether ComfyUI's own loader casts the unquantized tensors of the file to FP8, unlike ours."""
    return host.version == "0.3.75" and CAPABILITY >= (8, 9) and FORMATS[format].elements in (E4M3, E5M2)


def test_pack_loads_without_errors(comfy):
    nodes = comfy.object_info()
    ours = {name: node for name, node in nodes.items() if name.startswith("LearnedRounding")}
    assert set(ours) == {
        "LearnedRoundingLoadModel",
        "LearnedRoundingConfigure",
        "LearnedRoundingOptions",
        "LearnedRoundingQuantize",
        "LearnedRoundingSave",
        "LearnedRoundingCalibrate",
        "LearnedRoundingCalibrateText",
        "LearnedRoundingCompare",
        "LearnedRoundingCompareText",
        "LearnedRoundingReport",
        "LearnedRoundingInspect",
        "LearnedRoundingSaveCalibration",
        "LearnedRoundingLoadCalibration",
        "LearnedRoundingLoadQuantized",
    }
    assert f"diffusion_models/{MODEL}" in str(ours["LearnedRoundingLoadModel"]["input"]["required"]["model"])
    start = comfy.log_text().partition("To see the GUI")[0]
    mentions = [line for line in start.splitlines() if "custom_nodes/learned_rounding" in line]
    assert mentions
    assert not [line for line in mentions if "FAILED" in line or "File" in line or "ERROR" in line]
    assert any("learned_rounding.js" in path for path in comfy.get("/extensions"))


@pytest.mark.parametrize("format, options", CASES, ids=case_name)
def test_quantized_model_samples_near_full_precision(comfy, request, format, options):
    graph, name = ProbedGraph(), unique(request)
    model = graph.load()
    quantized = graph.quantize(model[0], format, seed=1000, **options)
    graph.sample(model[0], f"{name}-full", steps=STEPS)
    graph.sample(quantized[0], f"{name}-quantized", steps=STEPS)
    probe = graph.probe(quantized[0])
    result = comfy.queue(graph)

    layers = probed(result, probe)["layers"]
    expected = {event["name"].removesuffix(".weight") for event in progress(result) if event["state"] == "layer"}
    assert len(expected) > 30
    assert set(layers) == expected
    stored = str(FORMATS[format].storage_dtype).removeprefix("torch.")
    assert {stored} <= set(layers.values()) <= {stored, "int8"}  # sensitive layers take INT8 below 8 bits
    for full, ours in zip(
        pictures(comfy.output_dir, f"{name}-full"), pictures(comfy.output_dir, f"{name}-quantized"), strict=True
    ):
        assert floor(comfy.host, format) < psnr(full, ours) < float("inf")


@pytest.mark.parametrize("format, options", CASES, ids=case_name)
def test_saved_file_samples_bit_for_bit_as_in_the_graph(comfy, request, format, options):
    graph, name = ProbedGraph(), unique(request)
    quantized = graph.quantize(graph.load()[0], format, **options)
    graph.sample(quantized[0], f"{name}-graph")
    saved = graph.save(quantized, name)
    path = saved_path(comfy.queue(graph), saved)
    assert path.is_relative_to(comfy.output_dir / "diffusion_models")
    verification = verify_file(path)
    assert verification.layers > 30
    assert not verification.problems
    again = ProbedGraph()
    again.sample(again.load_quantized(path.name)[0], f"{name}-ours")
    ways = ["ours"]
    if loads(comfy.host, format) and not casts_to_fp8(comfy.host, format):
        again.sample(again.load(path.name)[0], f"{name}-stock")
        ways.append("stock")
    comfy.queue(again)
    for way in ways:
        assert np.array_equal(latents(comfy.output_dir, f"{name}-graph"), latents(comfy.output_dir, f"{name}-{way}"))


@pytest.mark.parametrize(
    "rounding", [{"rounding": "nearest"}, {"rounding": "principal", "num_iter": 3}], ids=["nearest", "learned"]
)
@pytest.mark.parametrize("format", ["nvfp4", "mxfp8"])
def test_saved_microscaling_file_samples_near_full_precision(comfy, request, format, rounding):
    """Microscaling formats through Load Diffusion Model, or Load Quantized Model where the host cannot run them."""
    graph, name = ProbedGraph(), unique(request)
    model = graph.load()
    graph.sample(model[0], f"{name}-full", steps=STEPS)
    saved = graph.save(graph.quantize(model[0], format, **rounding), name)
    path = saved_path(comfy.queue(graph), saved)
    again = ProbedGraph()
    loaded = (again.load if loads(comfy.host, format) else again.load_quantized)(path.name)
    again.sample(loaded[0], f"{name}-quantized", steps=STEPS)
    probe = again.probe(loaded[0])
    layers = probed(comfy.queue(again), probe)["layers"]
    assert len(layers) == verify_file(path).layers > 30
    for full, ours in zip(
        pictures(comfy.output_dir, f"{name}-full"), pictures(comfy.output_dir, f"{name}-quantized"), strict=True
    ):
        assert floor(comfy.host, format) < psnr(full, ours) < float("inf")


@pytest.mark.parametrize("format", [name for name, entry in FORMATS.items() if entry.stock_since is None])
def test_stock_nodes_load_patch_and_save_own_formats(comfy, request, format):
    """Stock nodes load, patch and save files in own formats; the saved files sample as the models did, with and without a LoRA."""
    if not takes_layouts(comfy.host):
        pytest.skip(f"ComfyUI {comfy.host.version} cannot load {format} files")
    if HOST_DEVICE == "cuda" and FORMATS[format].elements == INT8:
        pytest.skip("ComfyUI's own save node fails on INT8 layers, its own format's too, when they stream to a GPU")
    graph, name = ProbedGraph(), unique(request)
    saved = graph.save(graph.quantize(graph.source()[0], format), name)
    path = saved_path(comfy.queue(graph), saved)
    graph = ProbedGraph()
    model = graph.load(path.name)
    models = {"plain": model, "lora": graph.lora(model[0])}
    for kind, node in models.items():
        graph.sample(node[0], f"{name}-{kind}")
        graph.add("ModelSave", model=node[0], filename_prefix=f"diffusion_models/{name}-{kind}")
    comfy.queue(graph)
    graph = ProbedGraph()
    probes = {}
    for kind in models:
        model = graph.load(f"{name}-{kind}_00001_.safetensors")
        probes[kind] = graph.probe(model[0])
        graph.sample(model[0], f"{name}-{kind}-again")
    result = comfy.queue(graph)
    for kind, probe in probes.items():
        found = probed(result, probe)
        assert len(found["layers"]) > 30
        assert set(found["layers"].values()) == {str(FORMATS[format].storage_dtype).removeprefix("torch.")}
        made = comfy.output_dir / "diffusion_models" / f"{name}-{kind}_00001_.safetensors"
        assert verify_file(made).layers == len(found["layers"])
        # On a GPU a streamed layer with a LoRA is quantized again only when it is saved.
        if kind == "lora" and HOST_DEVICE == "cuda":
            assert psnr(*(pictures(comfy.output_dir, f"{name}-{kind}{end}") for end in ("", "-again"))) > 22
        else:
            assert np.array_equal(*(latents(comfy.output_dir, f"{name}-{kind}{end}") for end in ("", "-again")))
    assert psnr(*(pictures(comfy.output_dir, f"{name}-{kind}") for kind in models)) < 40


def test_every_widget_sets_its_recipe_option(comfy, request):
    """Untouched widgets give the recipe's defaults; changed ones give their values."""
    learned = {
        "rounding": "principal",
        "top_p": 0.25,
        "min_k": 2,
        "max_k": 64,
        "full_matrix": True,
        "weight_cost": 0.05,
    }
    steps = {"optimizer": "adamw", "num_iter": 3, "lr": 0.125, "lr_schedule": "plateau", "early_stop": 2}
    bias = {"bias_correction": "synthetic", "calib_samples": 4}
    cases = [
        ({"preset": "none"}, {"preset": "none"}),
        ({"granularity": "row", **learned}, {"format": "float8_e4m3fn_rowwise", "granularity": "row", **learned}),
        (
            {"format": "int8_tensorwise", "granularity": "block", "block_size": 32, **steps},
            {"format": "int8_blockwise", "granularity": "block", "block_size": 32, **steps},
        ),
        (
            {"format": "int8_tensorwise", "convrot": "64", "rounding": "stochastic", **bias},
            {"format": "int8_tensorwise", "granularity": "row", "convrot": 64, "rounding": "stochastic", **bias},
        ),
        (
            {"format": "int8_tensorwise", "convrot": "auto"},
            {"format": "int8_tensorwise", "granularity": "row", "convrot": "auto"},
        ),
        # a prompt without the input, of a workflow that is older than it
        ({"format": "int8_tensorwise"}, {"format": "int8_tensorwise", "granularity": "row"}),
        ({"format": "int8"}, {"format": "int8_tensorwise", "granularity": "row", "convrot": True}),
        # "auto", the default of new nodes, has no effect on formats without rotation
        ({"convrot": "auto"}, {}),
        (
            {"format": "int8_tensorwise", "granularity": "tensor", "convrot": "auto"},
            {"format": "int8_tensorwise", "granularity": "tensor"},
        ),
    ]
    small = {f"some.{index}.weight": torch.randn(64, 64) for index in range(2)}
    save_file(small, comfy.models_dir / "diffusion_models" / "small.safetensors")
    for number, (options, changed) in enumerate(cases):
        graph = ProbedGraph()
        source = graph.source("diffusion_models/small.safetensors")
        saved = graph.save(graph.quantize(source[0], general=True, **options), unique(request, str(number)))
        with safe_open(saved_path(comfy.queue(graph), saved), "pt") as opened:
            recipe = json.loads(opened.metadata()["learned_rounding"])["recipe"]
        assert recipe == {**Recipe().to_dict(), **changed}


def test_saved_file_loads_after_a_restart(server_factory, tiny_base, request):
    server = server_factory(base=tiny_base)
    graph, name = ProbedGraph(), unique(request)
    quantized = graph.quantize(graph.load()[0])
    graph.sample(quantized[0], f"{name}-before")
    saved = graph.save(quantized, name)
    path = saved_path(server.queue(graph), saved)
    server.restart()
    again = ProbedGraph()
    load = again.load_quantized if casts_to_fp8(server.host, "float8_e4m3fn") else again.load
    again.sample(load(path.name)[0], f"{name}-after")
    server.queue(again)
    assert np.array_equal(latents(server.output_dir, f"{name}-before"), latents(server.output_dir, f"{name}-after"))


def test_file_and_loaded_model_give_the_same_weights(comfy, request, tmp_path):
    graph, name = ProbedGraph(), unique(request)
    from_file = graph.save(graph.quantize(graph.source()[0], "int8_tensorwise"), f"{name}-file")
    model = graph.load()
    from_model = graph.save(graph.quantize(model[0], "int8_tensorwise"), f"{name}-model")
    probe = graph.probe(model[0])
    result = comfy.queue(graph)
    source, command_line = comfy.models_dir / "diffusion_models" / MODEL, tmp_path / "lrq.safetensors"
    recipe = Recipe(format="int8_tensorwise", convrot=False)
    quantize_file(source, command_line, recipe, device=HOST_DEVICE)
    assert saved_path(result, from_file).read_bytes() == command_line.read_bytes()
    if probed(result, probe)["dtype"] == "float16":  # ComfyUI 0.3.75 on a GPU; the conversion rounds small weights
        cast = tmp_path / "cast.safetensors"
        save_file({key: tensor.half() for key, tensor in load_file(source).items()}, cast)
        command_line = tmp_path / "of_cast.safetensors"
        quantize_file(cast, command_line, recipe, device=HOST_DEVICE)
    expected = load_file(command_line)
    ours = load_file(saved_path(result, from_model))
    assert ours.keys() == expected.keys()
    assert all(ours[key].dtype == expected[key].dtype and ours[key].equal(expected[key]) for key in expected)


def test_settings_of_the_incoming_model_are_copied(comfy):
    graph = ProbedGraph()
    shifted = graph.add("ModelSamplingSD3", model=graph.load()[0], shift=1.75)
    probe = graph.probe(graph.quantize(shifted[0])[0])
    assert probed(comfy.queue(graph), probe)["shift"] == 1.75


def test_models_are_built_only_for_connected_outputs(comfy):
    """Connecting MODEL later runs the node again without quantizing again."""
    graph = ProbedGraph()
    quantized = graph.quantize(graph.source()[0], seed=1001)
    graph.add("PreviewAny", source=quantized[3])  # Save Quantized would reload the file to verify it
    before = comfy.log_text().count("model_type FLOW")
    first = comfy.queue(graph)
    assert [event["state"] for event in progress(first)][-1] == "done"
    assert comfy.log_text().count("model_type FLOW") == before
    probe = graph.probe(quantized[0])
    second = comfy.queue(graph)
    assert len(probed(second, probe)["layers"]) > 30
    assert comfy.log_text().count("model_type FLOW") == before + 1
    assert not progress(second)


def test_same_inputs_use_the_cache(comfy, request):
    graph = ProbedGraph()
    quantized = graph.quantize(graph.source()[0], seed=1002)
    graph.save(quantized, unique(request))
    assert quantized.id in comfy.queue(graph).executed
    assert quantized.id not in comfy.queue(graph).executed


def test_saving_never_overwrites_files(comfy, request):
    name, paths = unique(request), []
    for folder in ("output", "output", "models"):
        graph = ProbedGraph()
        saved = graph.save(graph.quantize(graph.source()[0]), f"sub/{name}", folder)
        graph.add("PreviewAny", source=f"{folder}{len(paths)}")
        if len(paths) == 1:
            graph[saved.id]["inputs"]["filename_prefix"] = f"./sub/{name}"  # the same file, but not the cached node
        paths.append(saved_path(comfy.queue(graph), saved))
    assert len(set(paths)) == 3
    assert all(path.is_file() for path in paths)
    assert paths[0].name.endswith("float8_e4m3fn.safetensors")
    assert paths[1].name == paths[0].name.replace(".safetensors", "_00001_.safetensors")
    assert paths[2].is_relative_to(comfy.models_dir / "diffusion_models" / "sub")
    assert paths[0].read_bytes() == paths[1].read_bytes() == paths[2].read_bytes()
    with safe_open(paths[0], "pt") as opened:
        assert "_quantization_metadata" in opened.metadata()
        assert "learned_rounding" in opened.metadata()


@pytest.mark.parametrize("format", ["float8_e4m3fn", "int8_blockwise", "asym_w4a8_int8"])
def test_checkpoint_keeps_its_other_parts(comfy, request, format):
    """Only the diffusion model is quantized, the VAE is copied bit for bit, and the stock loader loads the file."""
    name = unique(request)
    model = load_file(comfy.models_dir / "diffusion_models" / MODEL)
    checkpoint = {f"model.diffusion_model.{key}": tensor for key, tensor in model.items()}
    checkpoint["first_stage_model.decoder.mid.attn_1.q.weight"] = torch.randn(64, 64).to(torch.bfloat16)
    folder = comfy.models_dir / "checkpoints"
    folder.mkdir(exist_ok=True)
    save_file(checkpoint, folder / f"{name}.safetensors")
    graph = ProbedGraph()
    quantized = graph.quantize(graph.source(f"checkpoints/{name}.safetensors")[0], format)
    saved = graph.save(quantized, name)
    graph.sample(quantized[0], f"{name}-graph")
    path = saved_path(comfy.queue(graph), saved)
    assert path.is_relative_to(comfy.output_dir / "checkpoints")
    assert not verify_file(path).problems
    made = load_file(path)
    vae = "first_stage_model.decoder.mid.attn_1.q.weight"
    assert made[vae].dtype == torch.bfloat16
    assert made[vae].equal(checkpoint[vae])
    if not loads(comfy.host, format):
        pytest.skip(f"ComfyUI {comfy.host.version} cannot load {format} files; the file was verified only")
    again = ProbedGraph()
    if casts_to_fp8(comfy.host, format):
        loaded = again.add("LearnedRoundingLoadQuantized", model=f"checkpoints/{path.name}")
    else:
        loaded = again.add("CheckpointLoaderSimple", ckpt_name=path.name)
    again.sample(loaded[0], f"{name}-file")
    assert (
        len(
            probed(
                comfy.queue({**again, "99": {"class_type": "ProbeModel", "inputs": {"model": loaded[0]}}}), Node("99")
            )["layers"]
        )
        > 30
    )
    assert np.array_equal(latents(comfy.output_dir, f"{name}-graph"), latents(comfy.output_dir, f"{name}-file"))


def test_quantized_tiny_model_draws_the_prompts(comfy, request):
    graph, name = ProbedGraph(), unique(request)
    graph.sample(graph.quantize(graph.load()[0])[0], name, seed=3, steps=STEPS)
    comfy.queue(graph)
    drawn, known = latents(comfy.output_dir, name), read_conditioning()["latents"].numpy()
    distances = ((drawn.reshape(len(drawn), 1, -1) - known.reshape(1, len(known), -1)) ** 2).sum(-1)
    assert [prompt_names()[index] for index in distances.argmin(1)] == ["red apple", "owl"]
