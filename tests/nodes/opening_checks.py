"""Checks of in_process.py: model files under ComfyUI's tensor names."""

import copy
import json
import re
from pathlib import Path
from types import SimpleNamespace

import comfy.sd
import comfy.utils
import folder_paths
import torch
from comfy import model_detection
from pack.nodes import host
from pack.nodes.configure import ConfigureQuantization
from pack.nodes.load import LoadModel
from pack.quant_core import Recipe, quantize_file
from pack.quant_core.errors import QuantizationError, SourceError
from pack.quant_core.formats.layer_json import config_tensor
from pack.quant_core.recipes.refused import find_refusal
from pack.quant_core.sources import SafetensorsFile, TensorInfo
from pack.quant_core.sources.diffusers_names import assemble_diffusers
from pack.quant_core.sources.renaming import RenamedSource
from pack.tests.architectures import read
from pack.tests.architectures.collect import DIFFUSION
from pack.tests.quant_core.sources.diffusers_lists import DIFFUSERS_LISTS, read_diffusers
from safetensors.torch import load_file, save_file

TINY = Path(host.__file__).parents[2] / "assets" / "tiny_mmdit_emoji.safetensors"
MODELS = Path(folder_paths.models_dir) / "diffusion_models"
# ComfyUI's mappings of diffusers' names.
MAPS = [getattr(comfy.utils, name) for name in dir(comfy.utils) if name.endswith("_to_diffusers")]
RECIPE = Recipe(format="int8_tensorwise", convrot=False, rounding="nearest")


def renamed(state: dict[str, torch.Tensor], names: dict) -> dict[str, torch.Tensor]:
    """``state`` under diffusers' names, by the inverse of one of ComfyUI's mappings."""
    found = {}
    for theirs, place in names.items():
        ours, part, change = (place, None, None) if isinstance(place, str) else (*place, None)[:3]
        if ours in state:
            tensor = state[ours] if part is None else state[ours].narrow(*part)
            found[theirs] = (change(tensor) if change else tensor).contiguous()  # a change is its own inverse
    return found


def tiny() -> dict[str, torch.Tensor]:
    """The tiny model under diffusers' names."""
    state = load_file(TINY)
    blocks = model_detection.count_blocks(state, "joint_blocks.{}.")
    depth = state["x_embedder.proj.weight"].shape[0] // 64
    return renamed(state, comfy.utils.mmdit_to_diffusers({"depth": depth, "num_blocks": blocks}))


def comes_back(name: str, to_diffusers) -> bool:
    """Whether a mapping has all tensor names of a model, and the conversion restores all names and shapes."""
    names = to_diffusers(copy.deepcopy(DIFFUSION[name].options))
    known = {place if isinstance(place, str) else place[0] for place in names.values()}
    shapes = {}
    for key, tensor in read(name).items():  # ComfyUI 0.3.75 calls the weight of a norm "scale"
        key = key if key in known else re.sub(r"_norm\.weight$", "_norm.scale", key)
        shapes[key] = torch.empty(tensor.shape, device="meta")
    if not shapes.keys() <= known:
        return False
    theirs = renamed(shapes, names)
    assert theirs.keys().isdisjoint({key for key in shapes if key.endswith("qkv.weight")})
    source = header(name, theirs)
    assert "diffusers" in find_refusal(theirs) and find_refusal(shapes) is None
    convert = host.opening._converter(source)
    ours = host.opening.RenamedWeights(source, convert).tensors if convert else {}
    return {key: info.shape for key, info in ours.items()} == {key: tuple(value.shape) for key, value in shapes.items()}


def header(name: str, tensors: dict[str, torch.Tensor]) -> SimpleNamespace:
    return SimpleNamespace(
        name=name,
        metadata={},
        tensors={key: TensorInfo(value.dtype, tuple(value.shape)) for key, value in tensors.items()},
    )


def refused_files() -> dict[str, str]:
    """Errors for files with diffusers' names that are not whole models, and what the node displays for a quantized one."""
    unet = {"conv_in.weight": torch.zeros(8, 7, 3, 3), "down_blocks.0.resnets.0.norm1.weight": torch.zeros(8)}
    flux2 = {
        "x_embedder.weight": torch.zeros(8, 8),
        "transformer_blocks.0.attn.add_k_proj.weight": torch.zeros(8, 8),
    }  # without biases
    more = tiny() | {"extra.weight": torch.zeros(8, 8)}
    files = {
        "diffusion_models/unet": unet,
        "diffusion_models/flux2": flux2,
        "diffusion_models/more": more,
        "checkpoints/more": more,
        "diffusion_models/quantized": quantized(tiny()),
    }
    said = {}
    for name, tensors in files.items():
        path = Path(folder_paths.models_dir) / f"{name}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, path)
        try:
            said[name] = LoadModel.execute(f"{name}.safetensors").ui.value
        except SourceError as error:
            said[name] = str(error)
    return said


def quantized(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors with one layer in INT8 as bitsandbytes stores it."""
    layer = next(key.removesuffix(".weight") for key, tensor in tensors.items() if tensor.dim() == 2)
    rows = tensors[f"{layer}.weight"].float().abs().amax(1).clamp(min=1e-6)
    values = (tensors[f"{layer}.weight"].float() / rows[:, None] * 127).round().to(torch.int8)
    return tensors | {f"{layer}.weight": values, f"{layer}.SCB": rows}


def own_rules() -> dict:
    """Effect of Configure Quantization's layer config on the tiny model."""
    rules = {"mlp": "skip", "attn.qkv": {"format": "fp8"}}
    recipe = ConfigureQuantization.execute(
        "int8_tensorwise", "row", "auto", 0, rounding="nearest", layer_config=json.dumps(rules)
    ).args[0]
    source = host.FileSource.choose("diffusion_models/comfyui.safetensors", host.clip_types()[0])
    report = host.quantize(source, recipe, lambda event: None).report
    return {
        "kept": sorted(
            {
                kept.name.split(".")[-2]
                for kept in report.kept
                if kept.reason == "layer config mlp" and "joint_blocks" in kept.name
            }
        ),
        "formats": sorted(
            {
                (layer.name.split(".")[-2], layer.format)
                for layer in report.layers
                if layer.name.startswith("joint_blocks")
            }
        ),
    }


def shards_replaced(shard: str) -> dict[str, bool]:
    """A shard changes and its index does not: the fingerprint of the node changes, and it quantizes again."""
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
    """Files of all file formats with diffusers' names equal those with ComfyUI's names."""
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
    save_file(original, MODELS / "safetensors.gguf")  # read by content
    for number in (1, 2):  # without an index
        torch.save(dict(list(original.items())[number - 1 :: 2]), MODELS / f"parts-{number:05}-of-00002.bin")
    for number in (0, 1):  # numbered from 0
        save_file(dict(list(original.items())[number::2]), MODELS / f"zero_{number}_of_2.sft")
    made = {}
    for choice in host.model_files():
        source = host.FileSource.choose(choice, host.clip_types()[0])
        with host.open_file(source) as weights:
            same = weights.tensors.keys() == original.keys()
            same = same and all(torch.equal(weights.read(name), tensor) for name, tensor in original.items())
            same = (
                same and source.path in weights.paths
            )  # the state of these paths decides whether a run can be resumed
        quantized = host.quantize(source, RECIPE, lambda event: None)
        shown = LoadModel.execute(choice).ui.value.splitlines()[-1]
        told = shown == quantized.report.recognised and dict(quantized.report._rows())["model"] == shown
        made[choice] = {"same": same, "told": shown if told else "", "codes": load_file(quantized.files[""])}
    replaced = shards_replaced(shards[1])
    expected = made["diffusion_models/comfyui.safetensors"]["codes"]
    for result in made.values():
        codes = result.pop("codes")
        result["quantized alike"] = codes.keys() == expected.keys() and all(
            torch.equal(codes[name], expected[name]) for name in codes
        )
    return {
        "files": made,
        "shards": replaced,
        "own rules": own_rules(),
        "safetensors_files": host.safetensors_files(),
        "renamed": [name for name in DIFFUSION if any(comes_back(name, to_diffusers) for to_diffusers in MAPS)],
        "refused": refused_files(),
    }


def broken() -> dict[str, str]:
    """Errors of Load Quantized Model for files with one invalid layer."""
    MODELS.mkdir(parents=True, exist_ok=True)
    quantize_file(
        TINY, MODELS / "sound.safetensors", Recipe(format="int8_blockwise", block_size=32, rounding="nearest")
    )
    layer = "joint_blocks.0.x_block.mlp.fc1"
    changes = {
        "no format": {"comfy_quant": config_tensor({})},
        "unknown": {"comfy_quant": config_tensor({"format": "int3"})},
        "no codes": {"weight": None},
        "other scales": {"weight_scale": torch.ones(3, 5)},
    }
    said = {}
    for name, change in changes.items():
        tensors = load_file(MODELS / "sound.safetensors") | {f"{layer}.{key}": value for key, value in change.items()}
        save_file({key: value for key, value in tensors.items() if value is not None}, MODELS / "broken.safetensors")
        try:
            host.load_quantized(host.FileSource.choose("diffusion_models/broken.safetensors", host.clip_types()[0]))
        except QuantizationError as error:
            said[name] = str(error)
    return said


def fits_comfyuis_class(name: str) -> bool | None:
    """Whether ComfyUI detects the converted names of a model and its class has the same tensors; None where it lacks that size."""
    shapes = {
        key: shape for key, shape in read_diffusers(name).items() if not re.search(r"blocks\.([2-9]|\d\d)\.", key)
    }
    source = header(name, {key: torch.empty(shape, device="meta") for key, shape in shapes.items()})
    source.path, source.paths, source.size = Path(name), (), 0
    renamed = RenamedSource(source, assemble_diffusers(source))
    state = {key: torch.empty(info.shape, device="meta") for key, info in renamed.tensors.items()}
    config = model_detection.model_config_from_unet(copy.copy(state), "")
    try:
        model = config.get_model(copy.copy(state), "", device="meta")
    except ValueError:
        return None
    expected = {key: value.shape for key, value in model.diffusion_model.state_dict().items()}
    return {key: value.shape for key, value in config.process_unet_state_dict(state).items()} == expected


def tiny_wan() -> dict[str, torch.Tensor]:
    """WAN of width 256 with one block under diffusers' names."""
    shapes = {
        key: shape for key, shape in read_diffusers("wan_t2v_1_3b").items() if not re.search(r"blocks\.[1-9]", key)
    }
    sides = {1536: 256, 8960: 512, 9216: 1536}
    generator = torch.Generator().manual_seed(0)
    return {
        key: (torch.randn([sides.get(side, side) for side in shape], generator=generator) * 0.05).bfloat16()
        for key, shape in shapes.items()
    }


def converted() -> dict:
    """Diffusers' names that ComfyUI has no converter for."""
    MODELS.mkdir(parents=True, exist_ok=True)
    save_file(tiny_wan(), MODELS / "wan.safetensors")
    source = host.FileSource.choose("diffusion_models/wan.safetensors", host.clip_types()[0])
    quantized = host.quantize(source, RECIPE, lambda event: None)
    model = host.build_model(source, quantized)
    return {
        "classes": {name: fits_comfyuis_class(name) for name in DIFFUSERS_LISTS},
        "told": quantized.report.recognised,
        "class": type(model.model).__name__,
        "layers": len(host.quantized_layers(model)),
    }


def configured() -> dict[str, object]:
    """Configuration of a quantized LTX-Video that its file has in the header: from the file, and from a MODEL."""
    MODELS.mkdir(parents=True, exist_ok=True)
    sides = {2048: 256, 4096: 4096, 8192: 1024, 12288: 1536}
    shapes = {key: tensor.shape for key, tensor in read("ltxv").items() if not re.search(r"blocks\.[1-9]", key)}
    generator = torch.Generator().manual_seed(0)
    tensors = {
        key: (torch.randn([sides.get(side, side) for side in shape], generator=generator) * 0.05).bfloat16()
        for key, shape in shapes.items()
    }
    found: dict[str, object] = {}
    for version, config in {"0.9.1": {}, "0.9.5": {"causal_temporal_positioning": True}}.items():
        metadata = {"config": json.dumps({"transformer": config})} if config else None
        save_file(tensors, MODELS / "ltxv.safetensors", metadata)
        source = host.FileSource.choose("diffusion_models/ltxv.safetensors", host.clip_types()[0])
        for kind, given in {"file": source, "model": comfy.sd.load_diffusion_model(str(source.path))}.items():
            quantized = host.quantize(given, RECIPE, lambda event: None)
            with SafetensorsFile(quantized.files[""]) as file:
                stored = file.metadata.get("config")
            model = host.build_model(given, quantized)
            causal = model.model.diffusion_model.causal_temporal_positioning
            found[f"{version} {kind}"] = [causal, stored and json.loads(stored)["transformer"]]
    return found


def checkpoints() -> dict[str, object]:
    """Whether a source has the state dict that ComfyUI's loader takes from a checkpoint; errors for shards that lack others."""
    MODELS.mkdir(parents=True, exist_ok=True)
    weights, averaged = load_file(TINY), {name: tensor * 2 for name, tensor in load_file(TINY).items()}
    files = {
        "plain": weights,
        "state_dict": {"ema": averaged, "state_dict": weights, "epoch": 3},
        "only averaged": {"ema": averaged},
        "averaged beside": {"state_dict": weights | {f"model_ema.{name}": tensor for name, tensor in averaged.items()}},
    }
    found: dict[str, object] = {}
    for name, content in files.items():
        torch.save(content, MODELS / f"{name}.ckpt")
        stock = comfy.utils.load_torch_file(str(MODELS / f"{name}.ckpt"), safe_load=True)
        with host.open_file(host.FileSource.choose(f"diffusion_models/{name}.ckpt", host.clip_types()[0])) as source:
            same = {key: torch.equal(source.read(key), stock[key]) for key in source.tensors}
        found[name] = same.keys() == stock.keys() and all(same.values())
    save_file(weights, MODELS / "lost-00002-of-00002.safetensors")
    choice = "diffusion_models/lost-00002-of-00002.safetensors"
    for node in (
        lambda: LoadModel.execute(choice),
        lambda: host.load_quantized(host.FileSource.choose(choice, host.clip_types()[0])),
    ):
        try:
            node()
        except QuantizationError as error:
            found[f"shard {len(found)}"] = str(error)
    found["listed"] = choice in host.model_files() or choice in host.safetensors_files()
    return found


CHECKS = {
    "opening_diffusers": diffusers,
    "opening_broken": broken,
    "opening_converted": converted,
    "opening_checkpoints": checkpoints,
    "opening_configured": configured,
}
