"""Model files of every kind, as ComfyUI will see them, inside the host's own process."""

from learned_rounding.tests.architectures.table import RENAMED
from learned_rounding.tests.nodes.probing import in_process


def test_a_layer_that_is_none_is_named(host, tmp_path):
    said = in_process(host, tmp_path, "opening_broken")
    parts = {
        "no format": "its format 'None' is not one",
        "unknown": "its format 'int3' is not one",
        "no codes": "no weight",
        "other scales": "the file has",
    }
    assert said.keys() == parts.keys()
    for name, part in parts.items():
        assert (
            said[name].startswith("broken.safetensors cannot be loaded: joint_blocks.0.x_block.mlp.fc1: ")
            and part in said[name]
        )


def test_every_kind_of_file_and_of_names_is_the_same_model(host, tmp_path):
    found = in_process(host, tmp_path, "opening_diffusers")
    kinds = ("comfyui.safetensors", "diffusers.safetensors", "pickle.pt", "tiny.safetensors.index.json")
    told = "Recognized as Stable Diffusion 3 and 3.5. The preset covers all 37 layers to quantize."
    assert found["files"] == {
        f"diffusion_models/{kind}": {"same": True, "told": told, "quantized alike": True} for kind in kinds
    }
    assert found["shards"] == dict.fromkeys(found["shards"], True) and len(found["shards"]) == 3
    formats = {name: format for name, format in found["own rules"]["formats"]}
    assert found["own rules"]["kept"] == ["fc1", "fc2"]
    assert formats["qkv"] == "float8_e4m3fn" and {format for name, format in formats.items() if name != "qkv"} == {
        "int8_tensorwise"
    }
    assert found["safetensors_files"] == [
        "diffusion_models/comfyui.safetensors",
        "diffusion_models/diffusers.safetensors",
    ]
    assert set(found["renamed"]) == RENAMED - ({"zimage"} if host.version == "0.3.75" else set())
    refused = found["refused"]
    assert len(refused) == 4 and not any("Load Model" in sentence for sentence in refused.values())
    assert all(
        sentence.endswith("give a file that has ComfyUI's names.")
        for name, sentence in refused.items()
        if "diffusion_models" in name
    )
    assert (
        "none of its own for 1 of its" in refused["diffusion_models/more"]
        and "such as extra.weight;" in refused["diffusion_models/more"]
    )
    assert "move it there" in refused["checkpoints/more"]
