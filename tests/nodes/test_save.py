"""Save Quantized reloads what it saved: sound files are called so, others are renamed and reported."""

from learned_rounding.quant_core import FORMATS
from learned_rounding.tests.nodes.probing import ProbedGraph, in_process, text
from learned_rounding.tests.nodes.test_graph import saved_path, unique

LAYER = "joint_blocks.0.x_block.mlp.fc1"
DAMAGES = {
    "scale": f"{LAYER}: weight_scale holds values that are not finite",
    "entry": f"{LAYER}: has a weight_scale but no comfy_quant tensor",
    "kept": f"1 tensors are missing in what is now verified_float8_e4m3fn_00002_.failed3.safetensors, first {LAYER}.bias",
    "shape": LAYER,
    "output": "off what the file's weights give",
}


def test_files_are_reloaded_and_damaged_ones_renamed(host, tmp_path):
    found = in_process(host, tmp_path, "verifying")
    assert set(found["sound"]) == set(FORMATS)
    for format, (said, failed) in found["sound"].items():
        assert said.startswith("Verified: ") and f"ran {format} per" in said and failed is None, said
        way = "ComfyUI's own loader" if format in found["knows"] else "this ComfyUI cannot read the format"
        assert way in said
    said, failed = found["text encoder"]
    assert "in ComfyUI's own quantized layer; ran" in said and failed is None
    for number, (damage, sentence) in enumerate(DAMAGES.items(), 1):
        said, failed, left = found["damaged"][damage]
        assert sentence in said, said
        assert len(failed) == number and not left
        assert any(name in said for name in failed)


def test_the_node_says_that_it_verified(comfy, request):
    graph = ProbedGraph()
    saved = graph.save(graph.quantize(graph.source()[0], rounding="nearest"), unique(request))
    result = comfy.queue(graph)
    assert saved_path(result, saved).is_file() and text(result, saved).endswith("_00001_.safetensors")
    assert result.outputs[saved.id]["text"][1].startswith("Verified: ")


def test_a_full_disk_leaves_all_files_or_none(host, tmp_path, tried):
    found = in_process(host, tmp_path, "full_disk")
    assert found["said"].endswith("text_encoders: No space left on device.") or found["said"].endswith("clip: No space left on device."), found["said"]
    assert found["left"] == []
    assert found["afterwards"] == ["full_first_label_00001_.safetensors", "full_second_label_00001_.safetensors"]
    tried("ENOSPC when Save Quantized copies", 1, "none, one sentence, next run works")
