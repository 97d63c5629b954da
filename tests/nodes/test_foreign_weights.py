"""A MODEL or CLIP whose weights belong to another pack: dequantized by it, else refused by name; quantized values are never taken for weights."""

import pytest

from learned_rounding.tests.nodes.probing import in_process


def test_weights_of_other_packs(host, tmp_path, sentences):
    found = in_process(host, tmp_path, "held_weights")
    for kind, results in found["decoded"].items():
        assert all(results.values()), (kind, results)
    assert found["patched"] == {
        "before": {"patched": True, "plain": True},
        "loaded": {"patched": True, "plain": True},
        "kept": True,
    }
    said = found["refused"]
    assert list(said) == [
        "no dequantization",
        "quantization state",
        "state dict alone",
        "packed bytes",
        "meta",
        "fails",
        "wrong shape",
    ]
    assert all("joint_blocks" in message or "embedder" in message for message in said.values()), said
    assert "ComfyUI-Other" in said["packed bytes"]
    sentences(*said.values())


def test_a_text_encoder_of_another_pack(host, tmp_path):
    if host.version == "0.3.75":
        pytest.skip("ComfyUI 0.3.75 recognises only T5 encoders of full width, and loads no quantized ones")
    found = in_process(host, tmp_path, "held_encoder")
    assert found == {"layers": 168, "same": True}
