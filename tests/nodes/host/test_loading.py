"""Quantized files with an invalid layer are refused by name."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from learned_rounding.quant_core import Recipe, quantize_file
from learned_rounding.quant_core.errors import QuantizationError
from learned_rounding.quant_core.formats.layer_json import config_tensor
from learned_rounding.tests.in_comfyui import IN_COMFYUI

if IN_COMFYUI:
    from learned_rounding.nodes import host as pack
    from learned_rounding.tests.nodes.host.tiny_model import TINY

LAYER = "joint_blocks.0.x_block.mlp.fc1"
# Damage → tensors of the layer that are replaced, or removed if None.
DAMAGES = {
    "no format": lambda: {"comfy_quant": config_tensor({})},
    "unknown": lambda: {"comfy_quant": config_tensor({"format": "int3"})},
    "no codes": lambda: {"weight": None},
    "other scales": lambda: {"weight_scale": torch.ones(3, 5)},
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_invalid_layer_is_refused_by_name(in_comfyui, damage, sentences):
    folder = in_comfyui / "models" / "diffusion_models"
    folder.mkdir()
    recipe = Recipe(format="int8_blockwise", block_size=32, rounding="nearest")
    quantize_file(TINY, folder / "sound.safetensors", recipe)
    changes = {f"{LAYER}.{key}": value for key, value in DAMAGES[damage]().items()}
    tensors = load_file(folder / "sound.safetensors") | changes
    save_file({key: value for key, value in tensors.items() if value is not None}, folder / "broken.safetensors")
    with pytest.raises(QuantizationError, match=rf"(?s)broken\.safetensors.*{LAYER}") as error:
        pack.load_quantized(pack.FileSource.choose("diffusion_models/broken.safetensors", pack.clip_types()[0]))
    sentences(error)
