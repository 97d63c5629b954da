"""Saved files are loaded again: valid ones are reported as verified, others are renamed and reported."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file, save_file

from learned_rounding.quant_core import FORMATS, QuantizationError
from learned_rounding.quant_core.formats.layer_json import config_tensor
from learned_rounding.tests.in_comfyui import IN_COMFYUI

if IN_COMFYUI:
    import comfy.ldm.hunyuan_video.model as hunyuan
    import comfy.ops
    import comfy.utils

    from learned_rounding.nodes import host as pack
    from learned_rounding.nodes.host import verifying
    from learned_rounding.tests.nodes.host.saved_files import output, quantize_tiny
    from learned_rounding.tests.nodes.host.tiny_model import TINY

pytestmark = pytest.mark.usefixtures("in_comfyui")

LAYER = "joint_blocks.0.x_block.mlp.fc1"  # 1024×256
KEPT = "x_embedder.proj.weight"
_HEADER = "_quantization_metadata"


def save(made) -> list[Path]:
    return pack.save_files(made, "verified", "output")


def verify(made, paths: list[Path] | None = None) -> str:
    """The summary of a valid file, which is left as it is."""
    paths = paths or save(made)
    said = pack.verify_saved(made, paths)
    assert [path for path in paths if not path.exists()] == []
    assert [path.name for path in output().rglob("*.failed*")] == []
    return said


def find_damage(made, paths: list[Path] | None = None) -> str:
    """The error of a damaged file, which is renamed."""
    paths = paths or save(made)
    with pytest.raises(QuantizationError) as error:
        pack.verify_saved(made, paths)
    assert [path for path in paths if path.exists()] == []
    (renamed,) = output().rglob("*.failed*")
    assert renamed.name in str(error.value)
    return str(error.value)


@pytest.fixture(autouse=True)
def _layouts(in_comfyui, request):
    if "damage" not in request.node.name:
        pack.add_layouts()


@pytest.mark.parametrize("format", FORMATS)
def test_valid_file_is_verified(format, sentences):
    sentences(verify(quantize_tiny(format)))


def hunyuan_image(names: Callable[[str], str]) -> dict[str, torch.Tensor]:
    """Small random HunyuanImage 2.1 whose layers are named by ``names`` of ComfyUI's names."""
    known = {
        "in_channels": 64,
        "out_channels": 64,
        "context_in_dim": 1024,
        "hidden_size": 256,
        "mlp_ratio": 4.0,
        "num_heads": 2,
        "depth": 1,
        "depth_single_blocks": 1,
        "axes_dim": [64, 64],
        "theta": 256,
        "patch_size": [1, 1],
        "qkv_bias": True,
    }
    options = {field.name: known.get(field.name) for field in dataclasses.fields(hunyuan.HunyuanVideoParams)}
    model = hunyuan.HunyuanVideo(**options, dtype=torch.bfloat16, operations=comfy.ops.disable_weight_init)
    generator = torch.Generator().manual_seed(0)
    return {
        names(name): (torch.randn(tensor.shape, generator=generator) / 16).to(torch.bfloat16)
        for name, tensor in model.state_dict().items()
    }


def with_scales(name: str) -> str:
    """Names of norms as in the file that ComfyUI publishes."""
    return name.replace("_norm.weight", "_norm.scale")


def as_published(name: str) -> str:
    """Names of layers as in the file that the authors of the model publish."""
    changes = {
        "_attn.qkv.": "_attn_qkv.",
        "_attn.proj.": "_attn_proj.",
        "_mod.lin.": "_mod.linear.",
        "_mlp.0.": "_mlp.fc1.",
        "_mlp.2.": "_mlp.fc2.",
    }
    for ours, theirs in changes.items():
        name = name.replace(ours, theirs)
    return with_scales(name)


def checkpoint() -> dict[str, torch.Tensor]:
    tensors = {f"model.diffusion_model.{name}": tensor for name, tensor in load_file(TINY).items()}
    return {**tensors, "first_stage_model.decoder.bias": torch.ones(4)}


def without_bias() -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in load_file(TINY).items() if name != "final_layer.linear.bias"}


def plain_layers() -> dict[str, torch.Tensor]:
    return {f"some.{index}.weight": torch.randn(64, 64) for index in range(2)}


# Model file → its tensors and kind.
FILES = {
    "checkpoint": (checkpoint, "checkpoints"),
    "renamed norms": (lambda: hunyuan_image(with_scales), "diffusion_models"),
    "renamed layers": (lambda: hunyuan_image(as_published), "diffusion_models"),
    "a tensor that ComfyUI does not know": (
        lambda: {**load_file(TINY), "unknown.bias": torch.ones(4)},
        "diffusion_models",
    ),
    "a tensor that the source lacks": (without_bias, "diffusion_models"),
    "no model": (plain_layers, "diffusion_models"),
    "no text encoder": (plain_layers, "text_encoders"),
}


@pytest.mark.parametrize("name", FILES)
def test_valid_file_of_another_kind_is_verified(host, tmp_path, name, sentences):
    make, kind = FILES[name]
    save_file(make(), tmp_path / f"{name}.safetensors")
    made = quantize_tiny(kind=kind, path=tmp_path / f"{name}.safetensors")
    # 0.3.75 looks up names that the model's own rules have changed.
    check = find_damage if name == "renamed layers" and host.version == "0.3.75" else verify
    sentences(check(made))


@pytest.mark.parametrize("format", ["nvfp4", "mxfp8"])
def test_padded_layers_are_verified(tmp_path, format, sentences):
    """Layers whose sides are not multiples of 16 or 32, to which the format pads its tensors."""
    path = tmp_path / "padded.safetensors"
    save_file({f"some.{index}.weight": torch.randn(40, 200 + 72 * index) for index in range(2)}, path)
    rules = json.dumps({"some": format})  # not 8 bits, as outside of blocks
    sentences(verify(quantize_tiny(format, path=path, layer_config=rules)))


def test_static_activation_scales_are_verified(sentences):
    """Small ones, on a host that quantizes activations as one with a GPU does."""
    made, reload = quantize_tiny(), verifying.reload_file

    def add_scales(tensors, _) -> None:
        tensors |= {
            name.replace("weight_scale", "input_scale"): torch.tensor(1e-4)
            for name in tensors
            if name.endswith("weight_scale")
        }

    def quantizing(*args):
        patcher = reload(*args)
        for module in patcher.model.modules():
            if hasattr(module, "_full_precision_mm"):
                module._full_precision_mm = False
        return patcher

    rewrite(made.files[""], add_scales)
    with patch.object(verifying, "reload_file", quantizing):
        sentences(verify(made))


def test_file_is_kept_if_memory_is_too_small_to_load_it(sentences):
    def too_large(*_):
        raise MemoryError

    with patch.object(verifying, "reload_file", too_large):
        sentences(verify(quantize_tiny()))


def rewrite(path: Path, change: Callable) -> None:
    """Apply ``change(tensors, metadata)`` to a file; the result is not a hard link to another file."""
    tensors, metadata = comfy.utils.load_torch_file(str(path), return_metadata=True)
    tensors, metadata = {name: tensor.clone() for name, tensor in tensors.items()}, dict(metadata)
    change(tensors, metadata)
    path.unlink()
    save_file(tensors, path, metadata)


def says(config: dict):
    """Replace the JSON of the layer in the tensor and in the header."""

    def change(tensors, metadata) -> None:
        tensors[f"{LAYER}.comfy_quant"] = config_tensor(config)
        header = json.loads(metadata[_HEADER])
        header["layers"][LAYER] = config
        metadata[_HEADER] = json.dumps(header)

    return change


def without_entry(tensors, metadata) -> None:
    del tensors[f"{LAYER}.comfy_quant"]
    header = json.loads(metadata[_HEADER])
    del header["layers"][LAYER]
    metadata[_HEADER] = json.dumps(header)


def without(name: str):
    return lambda tensors, _: tensors.pop(name)


def times(name: str, factor: float):
    return lambda tensors, _: tensors.update({name: (tensors[name].float() * factor).to(tensors[name].dtype)})


# Damages of the saved file.
ON_DISK = {
    "a kept tensor": times(KEPT, 2),
    "a bias": times(f"{LAYER}.bias", 2),
    "codes": times(f"{LAYER}.weight", -1),
    "a scale": times(f"{LAYER}.weight_scale", 2),
    "a tensor less": without(f"{LAYER}.bias"),
    "a tensor more": lambda tensors, _: tensors.update({"more": torch.ones(1)}),
    "another entry": says({"format": "float8_e4m3fn", "full_precision_matrix_mult": True}),
}
# Damages of the quantized file before it is saved.
AS_QUANTIZED = {
    "no number": times(f"{LAYER}.weight_scale", float("nan")),
    "no entry": without_entry,
    "a tensor less": without(f"{LAYER}.bias"),
    "a layer less": without(f"{LAYER}.weight"),
    "a tensor more": lambda tensors, _: tensors.update({"more": torch.ones(1)}),
    "rows less": lambda tensors, _: tensors.update({f"{LAYER}.weight": tensors[f"{LAYER}.weight"][:512].clone()}),
    "a kept tensor's shape": lambda tensors, _: tensors.update({KEPT: tensors[KEPT][:1].clone()}),
    "another format": says({"format": "float8_e5m2", "full_precision_matrix_mult": True}),
    "another rotation": lambda tensors, metadata: says(
        {**json.loads(metadata[_HEADER])["layers"][LAYER], "convrot": True, "convrot_groupsize": 64}
    )(tensors, metadata),
}


def set_scale(module, factor: float) -> None:
    if hasattr(module, "weight_scale"):  # a decoding layer
        module.weight_scale = module.weight_scale * factor
    elif hasattr(module.weight, "_params"):
        module.weight._params = dataclasses.replace(module.weight._params, scale=module.weight._params.scale * factor)
    else:
        module.weight._layout_params["scale"] = module.weight._layout_params["scale"] * factor


def set_codes(module) -> None:
    codes = getattr(module.weight, "_qdata", module.weight)
    changed = codes.detach().clone()
    changed.view(torch.uint8)[0, 0] ^= 1
    if codes is module.weight:
        module.weight = torch.nn.Parameter(changed, requires_grad=False)
    else:
        module.weight._qdata = changed


def set_format(module) -> None:
    if hasattr(module, "comfy_quant"):
        module.comfy_quant = config_tensor({"format": "float8_e5m2", "full_precision_matrix_mult": True})
    elif hasattr(module, "quant_format"):
        module._full_precision_mm_config = True
    else:
        module.layout_type = "another"


def parameter(tensor: torch.Tensor) -> torch.nn.Parameter:
    return torch.nn.Parameter(tensor, requires_grad=False)


def lose(model) -> None:
    """Rename the layer in the model."""
    mlp = model.get_submodule(LAYER.rpartition(".")[0])
    mlp.another = mlp.fc1
    del mlp.fc1


def louder(module) -> None:
    forward = module.forward
    module.forward = lambda inputs: forward(inputs) * 1.5


# Damages of the model that ComfyUI loaded from a valid file.
IN_COMFYUI_MODEL = {
    "a kept tensor": lambda model: setattr(
        model.x_embedder.proj, "weight", parameter(model.x_embedder.proj.weight * 2)
    ),
    "a kept tensor in 8 bits": lambda model: setattr(
        model.x_embedder.proj, "weight", parameter(model.x_embedder.proj.weight.to(torch.float8_e4m3fn))
    ),
    "a bias": lambda model: setattr(model.get_submodule(LAYER), "bias", parameter(model.get_submodule(LAYER).bias * 2)),
    "no bias": lambda model: setattr(model.get_submodule(LAYER), "bias", None),
    "codes": lambda model: set_codes(model.get_submodule(LAYER)),
    "a scale": lambda model: set_scale(model.get_submodule(LAYER), 2),
    "another entry": lambda model: set_format(model.get_submodule(LAYER)),
    "another name": lose,
    "another shape": lambda model: setattr(model.get_submodule(LAYER), "out_features", 512),
    "another output": lambda model: [
        louder(module) for module in model.modules() if isinstance(module, comfy.ops.CastWeightBiasOp)
    ],
}


# On the disk, before it is saved, or in ComfyUI.
DAMAGES = {
    **{f"on disk: {name}": (ON_DISK, name) for name in ON_DISK},
    **{f"as quantized: {name}": (AS_QUANTIZED, name) for name in AS_QUANTIZED},
    **{f"in ComfyUI: {name}": (IN_COMFYUI_MODEL, name) for name in IN_COMFYUI_MODEL},
}


def damage_and_verify(format: str, place: dict, name: str) -> str:
    change, made = place[name], quantize_tiny(format)
    if place is ON_DISK:
        paths = save(made)
        rewrite(paths[0], change)
        return find_damage(made, paths)
    if place is AS_QUANTIZED:
        rewrite(made.files[""], change)
        return find_damage(made)
    reload = verifying.reload_file

    def changed(*args):
        patcher = reload(*args)
        change(patcher.model.diffusion_model)
        return patcher

    with patch.object(verifying, "reload_file", changed):
        return find_damage(made)


@pytest.mark.parametrize("format", ["float8_e4m3fn", "int8_tensorwise"])  # decoding layers run INT8 on ComfyUI 0.3.75
def test_every_damage_is_found_and_the_file_renamed(format, tried, sentences, subtests):
    for damage, (place, name) in DAMAGES.items():
        with subtests.test(damage):
            sentences(damage_and_verify(format, place, name), measured=True)
        for path in output().rglob("verified*"):
            path.unlink()
    tried(
        "a saved file, or what ComfyUI's loader made of it, is not what was quantized",
        len(DAMAGES),
        "renamed and reported",
    )
