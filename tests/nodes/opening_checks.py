"""Checks of in_process.py: what a model file is opened as."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import comfy.utils
import folder_paths
import torch
from comfy import model_detection
from pack.nodes import host
from pack.nodes.configure import ConfigureQuantization
from pack.nodes.load import LoadModel
from pack.quant_core import Recipe
from pack.quant_core.checkpoints import TensorInfo
from pack.quant_core.recipes.refused import refusal
from pack.tests.architectures import read
from safetensors.torch import load_file, save_file

TINY = Path(host.__file__).parents[2] / "assets" / "tiny_mmdit_emoji.safetensors"
MODELS = Path(folder_paths.models_dir) / "diffusion_models"
# Published models → whose names ComfyUI maps how.
PUBLISHED = {
    "flux": ("flux", {"depth": 19, "depth_single_blocks": 38, "hidden_size": 3072}),
    "sd35_large": ("mmdit", {"depth": 38}),
    "auraflow": ("auraflow", {"n_double_layers": 4, "n_layers": 36}),
    "pixart_sigma": ("pixart", {"depth": 28}),
    "zimage": ("z_image", {"n_layers": 30, "dim": 3840}),
}
RECIPE = Recipe(format="int8_tensorwise", rounding="nearest")


def renamed(state: dict[str, torch.Tensor], names: dict) -> dict[str, torch.Tensor]:
    """``state`` under diffusers' names, by ComfyUI's map of them read backwards."""
    found = {}
    for theirs, place in names.items():
        ours, part, change = (place, None, None) if isinstance(place, str) else (*place, None)[:3]
        if ours in state:
            tensor = state[ours] if part is None else state[ours].narrow(*part)
            found[theirs] = (change(tensor) if change else tensor).contiguous()  # a change undoes itself
    return found


def tiny() -> dict[str, torch.Tensor]:
    """The tiny model under diffusers' names."""
    state = load_file(TINY)
    blocks = model_detection.count_blocks(state, "joint_blocks.{}.")
    depth = state["x_embedder.proj.weight"].shape[0] // 64
    return renamed(state, comfy.utils.mmdit_to_diffusers({"depth": depth, "num_blocks": blocks}))


def of_real_size(name: str, config: dict, to_diffusers) -> bool:
    """Whether a published model, of which the header alone is there, gets its names and shapes back, and none is planned without that."""
    names = to_diffusers(config)
    known = {place if isinstance(place, str) else place[0] for place in names.values()}
    shapes = {}
    for key, tensor in read(name).items():  # ComfyUI 0.3.75 calls the scale of a norm just that
        key = key if key in known else re.sub(r"_norm\.weight$", "_norm.scale", key)
        shapes[key] = torch.empty(tensor.shape, device="meta")
    theirs = renamed(shapes, names)
    assert theirs.keys().isdisjoint({key for key in shapes if key.endswith("qkv.weight")})
    source = SimpleNamespace(
        name=name, metadata={}, tensors={key: TensorInfo(value.dtype, tuple(value.shape)) for key, value in theirs.items()}
    )
    assert "diffusers" in refusal(theirs) and refusal(shapes) is None
    convert = host.opening._converter(source)
    ours = host.opening.RenamedWeights(source, convert).tensors if convert else {}
    mapped = {key: tuple(value.shape) for key, value in shapes.items() if key in known}  # tables of positions are made anew
    return {key: info.shape for key, info in ours.items()} == mapped and len(mapped) > 0.95 * len(shapes)


def own_rules() -> dict:
    """What Configure Quantization's layer config makes of the tiny model."""
    rules = {"mlp": "skip", "attn.qkv": {"format": "fp8"}}
    recipe = ConfigureQuantization.execute("int8_tensorwise", "row", "auto", 0, rounding="nearest", layer_config=json.dumps(rules)).args[0]
    source = host.FileSource.choose("diffusion_models/comfyui.safetensors", host.clip_types()[0])
    report = host.quantize(source, recipe, lambda event: None).report
    return {
        "kept": sorted({kept.name.split(".")[-2] for kept in report.kept if kept.reason == "layer config mlp" and "joint_blocks" in kept.name}),
        "formats": sorted({(layer.name.split(".")[-2], layer.format) for layer in report.layers if layer.name.startswith("joint_blocks")}),
    }


def shards_replaced(shard: str) -> dict[str, bool]:
    """One shard has other weights, its index stays: the node has another fingerprint and quantizes again."""
    choice = "diffusion_models/tiny.safetensors.index.json"
    source = host.FileSource.choose(choice, host.clip_types()[0])
    before, made = LoadModel.fingerprint_inputs(choice), host.quantize(source, RECIPE, lambda event: None)
    again = host.quantize(source, RECIPE, lambda event: None)
    save_file({name: tensor * 2 for name, tensor in load_file(MODELS / shard).items()}, MODELS / shard)
    other = host.quantize(source, RECIPE, lambda event: None)
    return {
        "the same before": made is again and made.files[""].exists(),
        "another fingerprint": LoadModel.fingerprint_inputs(choice) != before,
        "other codes": other is not made and made.files[""].read_bytes() != other.files[""].read_bytes(),
    }


def diffusers() -> dict:
    """Files with diffusers' names are those of ComfyUI's, in whatever kind of file they are."""
    MODELS.mkdir(parents=True, exist_ok=True)
    original, theirs = load_file(TINY), tiny()
    halves = [dict(list(theirs.items())[half::2]) for half in range(2)]
    shards = [f"tiny-{number:05}-of-00002.safetensors" for number in (1, 2)]
    places = {}
    for file, half in zip(shards, halves, strict=True):
        save_file(half, MODELS / file)
        places |= dict.fromkeys(half, file)
    (MODELS / "tiny.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    save_file(theirs, MODELS / "diffusers.safetensors")
    save_file(original, MODELS / "comfyui.safetensors")
    torch.save(original, MODELS / "pickle.pt")
    made = {}
    for choice in host.model_files():
        source = host.FileSource.choose(choice, host.clip_types()[0])
        with host.opened(source) as weights:
            same = weights.tensors.keys() == original.keys()
            same = same and all(torch.equal(weights.read(name), tensor) for name, tensor in original.items())
            same = same and source.path in weights.paths  # whose state tells a run whether it may go on with a dead one's
        quantized = host.quantize(source, RECIPE, lambda event: None)
        shown = LoadModel.execute(choice).ui.value.splitlines()[-1]
        told = shown == quantized.report.recognised and dict(quantized.report._rows())["model"] == shown
        made[choice] = {"same": same, "told": shown if told else "", "codes": load_file(quantized.files[""])}
    replaced = shards_replaced(shards[1])
    expected = made["diffusion_models/comfyui.safetensors"]["codes"]
    for result in made.values():
        codes = result.pop("codes")
        result["quantized alike"] = codes.keys() == expected.keys() and all(torch.equal(codes[name], expected[name]) for name in codes)
    sdxl = {key: torch.empty(tensor.shape, device="meta") for key, tensor in read("sdxl").items()}
    return {
        "files": made,
        "shards": replaced,
        "own rules": own_rules(),
        "safetensors_files": host.safetensors_files(),
        "sdxl": of_real_size("sdxl", model_detection.model_config_from_unet(sdxl, "").unet_config, comfy.utils.unet_to_diffusers),
        **{name: of_real_size(name, config, getattr(comfy.utils, f"{names}_to_diffusers")) for name, (names, config) in PUBLISHED.items()},
    }


CHECKS = {"opening_diffusers": diffusers}
