"""Checks of in_process.py: files of Save Quantized, and the damages that it finds."""

import dataclasses
import errno
import json
import os
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import comfy.ldm.hunyuan_video.model as hunyuan
import comfy.model_management
import comfy.ops
import comfy.utils
import folder_paths
import torch
from pack.nodes import host
from pack.quant_core import FORMATS, QuantizationError, Recipe
from pack.quant_core.formats.layer_json import config_tensor
from safetensors.torch import load_file, save_file

TINY = Path(host.__file__).parents[2] / "assets" / "tiny_mmdit_emoji.safetensors"
LAYER = "joint_blocks.0.x_block.mlp.fc1"  # 1024×256
KEPT = "x_embedder.proj.weight"
_HEADER = "_quantization_metadata"
PADDED = ("nvfp4", "mxfp8")


def output() -> Path:
    return Path(folder_paths.get_output_directory())


def quantized(
    format: str = "float8_e4m3fn", kind: str = "diffusion_models", path: Path = TINY, **options
) -> host.Quantized:
    """A new run; the cached result is dropped."""
    host.quantizing._last = None
    recipe = Recipe(format=format, rounding="nearest", **{"convrot": None, **options})
    return host.quantize(host.FileSource(path, kind, "sd3"), recipe, lambda event: None, general=True)


def verified(made: host.Quantized, paths: list[Path] | None = None) -> tuple[str, list[str], list[str]]:
    """(summary or error of Save Quantized, names of renamed files, names of saved files)."""
    paths = paths or host.save_files(made, "verified", "output")
    try:
        said = host.verify_saved(made, paths)
    except QuantizationError as error:
        said = str(error)
    left = [path.name for path in paths if path.exists()]
    failed = [path.name for path in output().rglob("*.failed*")]
    for path in output().rglob("verified*"):
        path.unlink()
    return said, failed, left


@contextmanager
def replaced(place: object, name: str, value: object):
    """Replace an attribute temporarily."""
    before = getattr(place, name)
    setattr(place, name, value)
    try:
        yield
    finally:
        setattr(place, name, before)


def without_links(call: Callable, links_within: Path | None = None):
    """Run ``call`` without hard links, or with hard links only inside ``links_within``, as between two disks."""
    link = os.link

    def refuse(path, target):
        if links_within is None or links_within not in Path(path).parents:
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
        link(path, target)

    with replaced(os, "link", refuse):
        return call()


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


def static_inputs() -> tuple:
    """A file with small static activation scales, on a host that quantizes activations as one with a GPU does."""
    made, reload = quantized(), host.verifying.reload_file

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

    rewritten(made.files[""], add_scales)
    with replaced(host.verifying, "reload_file", quantizing):
        return verified(made)


def padded(format: str) -> host.Quantized:
    """Layers whose sides are not multiples of 16 or 32, to which the format pads its tensors."""
    path = Path(folder_paths.base_path) / "padded.safetensors"
    save_file({f"some.{index}.weight": torch.randn(40, 200 + 72 * index) for index in range(2)}, path)
    return quantized(format, path=path, layer_config=json.dumps({"some": format}))  # not 8 bits, as outside of blocks


def valid() -> dict:
    """Valid files of all formats and kinds."""
    host.add_layouts()
    found = {name: verified(quantized(name)) for name in FORMATS}
    base = Path(folder_paths.base_path)
    checkpoint = {f"model.diffusion_model.{name}": tensor for name, tensor in load_file(TINY).items()}
    files = {
        "checkpoint": ({**checkpoint, "first_stage_model.decoder.bias": torch.ones(4)}, "checkpoints"),
        "renamed norms": (hunyuan_image(with_scales), "diffusion_models"),
        "renamed layers": (hunyuan_image(as_published), "diffusion_models"),
        "a tensor that ComfyUI does not know": ({**load_file(TINY), "unknown.bias": torch.ones(4)}, "diffusion_models"),
        "a tensor that the source lacks": (
            {name: tensor for name, tensor in load_file(TINY).items() if name != "final_layer.linear.bias"},
            "diffusion_models",
        ),
        "no model": ({f"some.{index}.weight": torch.randn(64, 64) for index in range(2)}, "diffusion_models"),
        "no text encoder": ({f"some.{index}.weight": torch.randn(64, 64) for index in range(2)}, "text_encoders"),
    }
    for name, (tensors, kind) in files.items():
        path = base / f"{name}.safetensors"
        save_file(tensors, path)
        found[name] = verified(quantized(kind=kind, path=path))
    found |= {f"padded {name}": verified(padded(name)) for name in PADDED}
    found["static inputs"] = static_inputs()

    def too_large(*_):
        raise MemoryError

    with replaced(host.verifying, "reload_file", too_large):
        too_little = verified(quantized())
    return {
        "found": found,
        "too little memory": too_little,
        "knows": [name for name in FORMATS if host.supports_format(name)],
    }


def rewritten(path: Path, change: Callable) -> None:
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
IN_COMFYUI = {
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


def tampered(format: str = "float8_e4m3fn") -> dict:
    """Every kind of damage at every place where it can occur."""
    found = {}
    for name, change in ON_DISK.items():
        made = quantized(format)
        paths = host.save_files(made, "verified", "output")
        rewritten(paths[0], change)
        found[f"on disk: {name}"] = verified(made, paths)
    for name, change in AS_QUANTIZED.items():
        made = quantized(format)
        rewritten(made.files[""], change)
        found[f"as quantized: {name}"] = verified(made)
    reload = host.verifying.reload_file
    for name, change in IN_COMFYUI.items():

        def changed(*args, change=change):
            patcher = reload(*args)
            change(patcher.model.diffusion_model)
            return patcher

        with replaced(host.verifying, "reload_file", changed):
            found[f"in ComfyUI: {name}"] = verified(quantized(format))
    return found


def tampered_int8() -> dict:
    """The same for a format that ComfyUI 0.3.75 runs on decoding layers."""
    return tampered("int8_tensorwise")


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def names() -> dict:
    """File name prefixes with the source model of the node "1" in a graph."""
    nodes = json.loads((Path(folder_paths.base_path) / "nodes.json").read_text(encoding="utf-8"))
    prompt = SimpleNamespace(get_node=lambda node_id: {"inputs": nodes[node_id]})
    named, plain = (host.insert_model_name(prefix, prompt, "1") for prefix in ("sub/%model%_x", "mine"))
    return {"named": named, "plain": plain}


CHECKS = {f"saving_{check.__name__}": check for check in (valid, tampered, tampered_int8, names)}
