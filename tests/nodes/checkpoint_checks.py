"""Checks of in_process.py: a whole checkpoint whose T5 is quantized with the diffusion model; its CLIP-L stays unquantized."""

from pathlib import Path

import comfy.sd
import folder_paths
import torch
from pack.nodes import host
from pack.quant_core import Recipe
from pack.quant_core.convert.dequantize import DecodedSource
from pack.quant_core.formats.layer_json import layer_configs
from pack.quant_core.output import inspect_file
from pack.quant_core.run.quantize import quantize_file
from pack.quant_core.sources import SafetensorsFile
from safetensors.torch import load_file, save_file

from __main__ import TINY_T5, encode, t5_weights

TINY = Path(host.__file__).parents[2] / "assets" / "tiny_mmdit_emoji.safetensors"
RECIPES = {
    "float8_e4m3fn": Recipe(rounding="nearest"),
    "int8_tensorwise": Recipe(format="int8_tensorwise", convrot=True, rounding="nearest"),
    "int8_blockwise": Recipe(format="int8_blockwise", block_size=32, rounding="nearest"),
}
# Weights whose shape is not that of the layer: a ComfyUI that loads no quantized encoders fails to load them.
PACKED = {name: Recipe(format=name, rounding="nearest") for name in ("asym_w4a8_int8", "nvfp4")}


def clip_of(path: Path, **options):
    """The CLIP of a checkpoint from stock ComfyUI with the small width of its T5."""
    return comfy.sd.load_checkpoint_guess_config(
        str(path), output_vae=False, output_model=False, te_model_options={**TINY_T5, **options}
    )[1]


def encoder() -> dict:
    """Quantize by command line and by node; load the file by ComfyUI's own checkpoint loader."""
    host.add_layouts()
    folder = Path(folder_paths.models_dir) / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    weights = {f"model.diffusion_model.{name}": tensor for name, tensor in load_file(TINY).items()}
    weights |= {f"text_encoders.t5xxl.transformer.{name}": tensor for name, tensor in t5_weights().items()}
    weights["first_stage_model.decoder.mid.attn_1.q.weight"] = torch.ones(64, 64)
    save_file(weights, folder / "whole.safetensors")
    before = encode(clip_of(folder / "whole.safetensors"))
    recipes = RECIPES | (PACKED if host.sources.READS_ENCODERS else {})
    return {name: _made(folder, recipe, before) for name, recipe in recipes.items()}


def _made(folder: Path, recipe: Recipe, before: torch.Tensor) -> dict:
    made = folder / f"{recipe.format.name}.safetensors"
    report = quantize_file(folder / "whole.safetensors", made, recipe)
    with SafetensorsFile(made) as opened:
        layers = layer_configs(opened)[0]
    source = host.FileSource.choose("checkpoints/whole.safetensors", host.clip_types()[0])
    quantized = host.quantize(source, recipe, lambda event: None)
    model = host.build_model(source, quantized)
    (saved,) = host.save_files(quantized, "whole", "output")
    with SafetensorsFile(made) as opened:
        decoded = DecodedSource(opened)
        save_file({name: decoded.read(name) for name in decoded.tensors}, folder / "decoded.safetensors")
    clip = clip_of(made)
    after, meant = encode(clip), encode(clip_of(folder / "decoded.safetensors"))
    return {
        "in the file": sum(layer.startswith("text_encoders.") for layer in layers),
        "of all": len(layers) == len(report.layers),
        "stock": inspect_file(made).stock,
        "in the CLIP": len(host.quantized_layers(clip.patcher)),
        "of the MODEL": len(host.quantized_layers(model)) == sum(layer.startswith("model.") for layer in layers),
        "error": _distance(after, before),
        "error of running codes": _distance(after, meant),
        "by the node": saved.read_bytes() == made.read_bytes(),
        "kept by the node": sum(kept.reason.startswith("keep pattern") for kept in quantized.report.kept),
        "verified": host.verify_saved(quantized, [saved]),
    }


def _distance(after: torch.Tensor, before: torch.Tensor) -> float:
    return float((after - before).norm() / before.norm())


CHECKS = {"checkpoint_encoder": encoder}
