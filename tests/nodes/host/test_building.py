"""CLIPs built from quantized files. No stock node loads a text encoder that is small enough for a test."""

import functools
from unittest.mock import patch

import pytest
import torch

from learned_rounding.quant_core import Recipe
from learned_rounding.tests.in_comfyui import IN_COMFYUI

if IN_COMFYUI:
    import comfy.sd
    import folder_paths

    from learned_rounding.nodes import host as pack
    from learned_rounding.tests.nodes.host.saved_files import save_without_links
    from learned_rounding.tests.nodes.host.tiny_model import distance
    from learned_rounding.tests.nodes.host.tiny_t5 import LAYERS, encode, load_t5, load_tiny, save_t5

pytestmark = pytest.mark.usefixtures("in_comfyui", "host_with_small_encoders")

# Recipe, whether our layouts are registered, and relative error of the conditioning of a random model of width 64.
# Activations may be quantized too; conditionings that have nothing in common would be √2 apart. Sensitive layers take INT8
# below 8 bits.
CASES = {
    "float8_e4m3fn": ({}, False, 0.6),
    "int8_tensorwise": ({"convrot": False}, False, 0.3),
    "int8_tensorwise convrot": ({"convrot": True}, False, 0.3),
    "int8_blockwise decoded": ({"block_size": 32}, False, 0.3),
    "int8_blockwise": ({"block_size": 32}, True, 0.4),
    "float8_e4m3fn_blockwise": ({"block_size": 64}, True, 0.9),
    "float8_e4m3fn_rowwise": ({}, True, 0.9),
    "asym_w4a8_int8": ({}, True, 0.7),
    "asym_w4a8_int8 6 bits": ({"bits": 6}, True, 0.4),
    "convrot_w4a4": ({}, True, 0.9),
    "nvfp4": ({}, True, 0.9),
    "mxfp8": ({}, True, 0.5),
}


@pytest.mark.parametrize("name", CASES)
def test_clip_in_the_graph_equals_its_file(tmp_path, name, sentences):
    options, registered, bound = CASES[name]
    if registered:
        pack.add_layouts()
    clip = load_t5(save_t5(tmp_path))
    before = encode(clip)
    quantized = pack.quantize(clip, Recipe(format=name.split()[0], **options), lambda event: None)
    ours = pack.build_clip(clip, quantized)
    assert len(pack.quantized_layers(ours.patcher)) == LAYERS
    devices = {tensor.device for tensor in ours.cond_stage_model.state_dict().values()}
    assert devices == {ours.patcher.offload_device}  # although the incoming CLIP was loaded
    conditioning = encode(ours)
    assert 0 < distance(conditioning, before) < bound
    assert torch.equal(encode(clip), before)
    assert pack.quantized_layers(clip.patcher) == {}

    (saved,) = pack.save_files(quantized, "t5", "output")
    (file,) = quantized.files.values()
    assert str(saved.relative_to(folder_paths.get_output_directory())).startswith("clip/t5_t5xxl_")
    assert file.read_bytes() == saved.read_bytes()
    (copied,) = save_without_links(lambda: pack.save_files(quantized, "t5", "output"))
    assert copied != saved
    assert copied.read_bytes() == saved.read_bytes()
    assert list(copied.parent.glob(".*")) == []

    decoded = bool(pack.decoding.layers_to_decode(saved))
    assert decoded is (name == "int8_blockwise decoded")
    extra = pack.decoding.decoding_options(comfy.sd.load_clip)["model_options"] if decoded else {}
    loaded = load_t5(saved, **extra)
    assert len(pack.quantized_layers(loaded.patcher)) == LAYERS
    assert torch.equal(conditioning, encode(loaded))
    with patch.object(comfy.sd, "load_clip", functools.partial(load_tiny, comfy.sd.load_clip)):
        sentences(pack.verify_saved(quantized, [saved]))
