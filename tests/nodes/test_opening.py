"""Model files of all file formats under ComfyUI's names, inside the host's process."""

from learned_rounding.tests.architectures.table import CONVERTED, RENAMED
from learned_rounding.tests.nodes.probing import in_process


def test_invalid_layers_are_rejected_by_name(host, tmp_path, sentences):
    refused = in_process(host, tmp_path, "opening_broken")
    assert list(refused) == ["no format", "unknown", "no codes", "other scales"]
    for message in refused.values():
        assert "broken.safetensors" in message and "joint_blocks.0.x_block.mlp.fc1" in message
        sentences(message)


def test_all_file_formats_and_names_give_the_same_model(host, tmp_path, sentences):
    found = in_process(host, tmp_path, "opening_diffusers")
    kinds = (
        "comfyui.safetensors",
        "diffusers.safetensors",
        "parts-00001-of-00002.bin",
        "pickle.pt",
        "safetensors.gguf",
        "zero_0_of_2.sft",
    )
    kinds += ("tiny.safetensors.index.json",)
    (told,) = {result.pop("told") for result in found["files"].values()}
    sentences(told)
    assert found["files"] == {f"diffusion_models/{kind}": {"same": True, "quantized alike": True} for kind in kinds}
    assert found["shards"] == dict.fromkeys(found["shards"], True) and len(found["shards"]) == 3
    formats = dict(found["own rules"]["formats"])
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
    assert "already quantized: bitsandbytes INT8" in refused.pop("diffusion_models/quantized")
    assert len(refused) == 4
    sentences(*refused.values())


NOT_IN_0_3_75 = {"flux2_klein_4b", "flux2_klein_9b"}


def test_names_that_comfyui_does_not_convert_fit_its_classes(host, tmp_path, sentences):
    found = in_process(host, tmp_path, "opening_converted")
    missing = NOT_IN_0_3_75 if host.version == "0.3.75" else set()
    assert found["classes"] == {name: None if name in missing else True for name in CONVERTED}
    assert found["class"] == "WAN21" and found["layers"] == 10
    sentences(found["told"])


def test_what_comfyui_reads_from_the_header_is_in_the_quantized_file(host, tmp_path):
    """The positions of frames of LTX-Video depend on its version, which its tensors do not show."""
    found = in_process(host, tmp_path, "opening_configured")
    causal = {"causal_temporal_positioning": True}
    assert found == {
        "0.9.1 file": [False, None],
        "0.9.1 model": [False, None],
        "0.9.5 file": [True, causal],
        "0.9.5 model": [True, causal],
    }


def test_checkpoints_give_the_weights_of_comfyuis_loader(host, tmp_path, sentences):
    found = in_process(host, tmp_path, "opening_checkpoints")
    shards = [found.pop(name) for name in list(found) if name.startswith("shard")]
    assert found.pop("listed") is False and len(found) == 4 and all(found.values())
    assert len(shards) == 2 and "lost-00001-of-00002.safetensors is missing" in shards[0]
    sentences(shards)
