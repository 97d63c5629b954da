"""Text encoders in checkpoints are quantized with the diffusion model where ComfyUI loads them quantized."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from learned_rounding.quant_core import FORMATS, Recipe
from learned_rounding.quant_core.convert.dequantize import DecodedSource
from learned_rounding.quant_core.formats.layer_json import layer_configs
from learned_rounding.quant_core.output import inspect_file
from learned_rounding.quant_core.run.quantize import quantize_file
from learned_rounding.quant_core.sources import SafetensorsFile
from learned_rounding.tests.in_comfyui import IN_COMFYUI

if IN_COMFYUI:
    import comfy.sd

    from learned_rounding.nodes import host as pack
    from learned_rounding.tests.nodes.host.tiny_model import TINY, distance
    from learned_rounding.tests.nodes.host.tiny_t5 import LAYERS, TINY_T5, encode, t5_weights

# Format → recipe, and relative error of the conditioning of a random model of width 64; unrelated ones have an error of √2.
CASES = {
    "float8_e4m3fn": ({}, 1),
    "int8_tensorwise": ({"convrot": True}, 0.5),
    "int8_blockwise": ({"block_size": 32}, 0.7),
    # Weights whose shape is not that of the layer: a ComfyUI that loads no quantized encoders fails to load them.
    "asym_w4a8_int8": ({}, 1.2),
    "nvfp4": ({}, 1.3),
}
RUNNING = 0.2  # against the same weights dequantized beforehand


def reads_encoders(host) -> bool:
    """0.3.75 loads no quantized layers there: the node leaves them unquantized, and inspect reports it."""
    return host.version != "0.3.75"


def load_clip(path):
    """The CLIP of a checkpoint from ComfyUI's loader with the small width of its T5."""
    options = {"output_vae": False, "output_model": False, "te_model_options": TINY_T5}
    return comfy.sd.load_checkpoint_guess_config(str(path), **options)[1]


@pytest.fixture
def checkpoint(in_comfyui):
    """A checkpoint of the tiny model, a T5 and a part of a VAE."""
    pack.add_layouts()
    folder = in_comfyui / "models" / "checkpoints"
    folder.mkdir(parents=True)
    weights = {f"model.diffusion_model.{name}": tensor for name, tensor in load_file(TINY).items()}
    weights |= {f"text_encoders.t5xxl.transformer.{name}": tensor for name, tensor in t5_weights().items()}
    weights["first_stage_model.decoder.mid.attn_1.q.weight"] = torch.ones(64, 64)
    save_file(weights, folder / "whole.safetensors")
    return folder / "whole.safetensors"


@pytest.mark.parametrize("format", CASES)
def test_t5_of_a_checkpoint_is_quantized_where_comfyui_supports_it(host, checkpoint, format, sentences):
    options, bound = CASES[format]
    reads = reads_encoders(host)
    if not reads and format in ("asym_w4a8_int8", "nvfp4"):
        pytest.skip("ComfyUI 0.3.75 cannot load such layers in the text encoder of a checkpoint")
    recipe = Recipe(format=format, rounding="nearest", **options)
    made, meant = checkpoint.with_name("made.safetensors"), checkpoint.with_name("decoded.safetensors")
    report = quantize_file(checkpoint, made, recipe)
    with SafetensorsFile(made) as opened:
        layers = layer_configs(opened)[0]
        decoded = DecodedSource(opened)
        save_file({name: decoded.read(name) for name in decoded.tensors}, meant)
    assert len(layers) == len(report.layers)
    assert sum(layer.startswith("text_encoders.") for layer in layers) == LAYERS
    stock = inspect_file(made).stock
    assert ("0.33" in stock) is bool(FORMATS[format].stock_since)

    clip = load_clip(made)
    assert len(pack.quantized_layers(clip.patcher)) == (LAYERS if reads else 0)
    encoded = encode(clip)
    assert (distance(encoded, encode(load_clip(checkpoint))) < bound) is reads
    assert (distance(encoded, encode(load_clip(meant))) < RUNNING) is reads

    source = pack.FileSource.choose("checkpoints/whole.safetensors", pack.clip_types()[0])
    quantized = pack.quantize(source, recipe, lambda event: None)
    (saved,) = pack.save_files(quantized, "whole", "output")
    assert (saved.read_bytes() == made.read_bytes()) is reads
    kept = [layer for layer in quantized.report.kept if layer.reason.startswith("keep pattern")]
    assert bool(kept) is not reads
    model_layers = [layer for layer in layers if layer.startswith("model.")]
    assert len(pack.quantized_layers(pack.build_model(source, quantized))) == len(model_layers)
    sentences(pack.verify_saved(quantized, [saved]), stock)
