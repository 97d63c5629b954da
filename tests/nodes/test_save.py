"""Save Quantized reloads what it saved: sound files are called so, others are renamed and reported."""

import pytest

from learned_rounding.quant_core import FORMATS
from learned_rounding.tests.nodes.probing import ProbedGraph, in_process, text
from learned_rounding.tests.nodes.test_graph import saved_path, unique

LAYER = "joint_blocks.0.x_block.mlp.fc1"
RELOADED = "reloaded by ComfyUI's own loader and compared key by key"
# What else is said of a sound file.
REMARKS = {
    "checkpoint": "1 tensor (first_stage_model.decoder.bias) is no part of what was reloaded, and as written.",
    "a tensor that ComfyUI does not know": "1 tensor (unknown.bias) is not compared: ComfyUI's model has no such tensor, of the original either.",
    "a tensor that the source lacks": "1 tensor (final_layer.linear.bias) is in ComfyUI's model alone: the source lacks it, or a rule removed it.",
}
CHANGED = "is no longer what was quantized; check the disk, and save again."
# What is said of one that is not.
DAMAGES = {
    "on disk: a kept tensor": CHANGED,
    "on disk: a bias": CHANGED,
    "on disk: codes": CHANGED,
    "on disk: a scale": CHANGED,
    "on disk: a tensor less": CHANGED,
    "on disk: a tensor more": CHANGED,
    "on disk: another entry": CHANGED,
    "as quantized: no number": f"{LAYER}: weight_scale holds values that are not finite",
    "as quantized: no entry": f"{LAYER}: has a weight_scale but no comfy_quant tensor",
    "as quantized: a tensor less": f"1 tensor ({LAYER}.bias) is missing; please report the model.",
    "as quantized: a layer less": f"{LAYER}: has a quantization entry but no weight",
    "as quantized: a tensor more": "1 tensor (more) is there that nothing has written.",
    "as quantized: rows less": f"{LAYER}: ",
    "as quantized: a kept tensor's shape": "x_embedder.proj.weight: has shape (1, 16, 2, 2), and (256, 16, 2, 2) was kept.",
    "as quantized: another format": f"{LAYER}: float8_e5m2 needs weight",
    "as quantized: another rotation": f"{LAYER}: ",
    "in ComfyUI: a kept tensor": "x_embedder.proj: ComfyUI holds another weight than the file.",
    "in ComfyUI: a kept tensor in 8 bits": "x_embedder.proj: ComfyUI holds another weight than the file.",
    "in ComfyUI: a bias": f"{LAYER}: ComfyUI holds another bias than the file.",
    "in ComfyUI: no bias": f"{LAYER}: ComfyUI's model does not hold its bias.",
    "in ComfyUI: codes": f"{LAYER}: ComfyUI holds another weight than the file.",
    "in ComfyUI: a scale": f"{LAYER}: ComfyUI holds another weight_scale than the file.",
    "in ComfyUI: another entry": LAYER,
    "in ComfyUI: another name": f"{LAYER}: ComfyUI's model has no layer of that name.",
    "in ComfyUI: another shape": f"{LAYER}: the weight has shape (1024, 256), and the model needs (512, 256).",
    "in ComfyUI: another output": "its output in ComfyUI is 0.5 off what the file's weights give.",
}


def test_sound_files_are_reloaded_and_called_so(host, tmp_path):
    found = in_process(host, tmp_path, "saving_sound")
    saved, (said, failed, left) = found["found"], found["too little memory"]
    assert said.startswith("Not verified: ") and failed == [] and len(left) == 1
    if host.version == "0.3.75":  # it looks names up that the model's own rules have changed
        said, failed, left = saved.pop("renamed layers")
        assert "took only 9 of 23 quantized layers" in said and len(failed) == 1 and not left
    for name, (said, failed, left) in saved.items():
        assert said.startswith("Verified: ") and f"; ran {name if name in FORMATS else 'float8_e4m3fn'} per " in said, (
            name,
            said,
        )
        assert failed == [] and len(left) == 1
        recognised = not name.startswith("no ")
        assert (RELOADED in said) is recognised and (
            "because ComfyUI does not recognise the model" in said
        ) is not recognised
        assert ("this ComfyUI cannot read the format" in said) is (name in FORMATS and name not in found["knows"])
        assert said.count("tensor (") == said.count(REMARKS.get(name, "-")), said


@pytest.mark.parametrize("check", ["tampered", "tampered_int8"])
def test_whatever_is_wrong_is_found_and_the_file_renamed(host, tmp_path, tried, check):
    found = in_process(host, tmp_path, f"saving_{check}")
    assert found.keys() == DAMAGES.keys()
    for damage, (said, failed, left) in found.items():
        assert (
            said.startswith("The saved file does not load as it was quantized and is now ") and DAMAGES[damage] in said
        ), (damage, said)
        assert len(failed) == 1 and failed[0] in said and left == [], damage
    tried(
        "a saved file, or what ComfyUI's loader made of it, is not what was quantized",
        len(found),
        "renamed and reported",
    )


def test_the_node_says_that_it_verified(comfy, request):
    graph = ProbedGraph()
    saved = graph.save(graph.quantize(graph.source()[0], rounding="nearest"), unique(request))
    result = comfy.queue(graph)
    assert saved_path(result, saved).is_file() and text(result, saved).endswith("_00001_.safetensors")
    assert result.outputs[saved.id]["text"][1].startswith("Verified: ")


def test_a_full_disk_leaves_all_files_or_none(host, tmp_path, tried):
    found = in_process(host, tmp_path, "saving_full_disk")
    assert found["said"].endswith("text_encoders: No space left on device.") or found["said"].endswith(
        "clip: No space left on device."
    ), found["said"]
    assert found["left"] == []
    assert found["afterwards"] == ["full_first_label_00001_.safetensors", "full_second_label_00001_.safetensors"]
    tried("ENOSPC when Save Quantized copies", 1, "none, one sentence, next run works")


NAMES = ["verified_float8_e4m3fn_00001_.safetensors", "verified_float8_e4m3fn_00002_.safetensors"]


def test_models_are_saved_on_other_disks_over_nothing_that_is_there(host, tmp_path, tried):
    found = in_process(host, tmp_path, "saving_other_disks")
    for disk in ("another disk", "a disk without links"):
        saved = found[disk]
        assert saved["names"] == saved["files"] == NAMES and saved["same"] and saved["copies"], disk
        assert saved["verified"].startswith("Verified: ")
    assert found["temp"] == {"same": True, "moves": 1, "left": []}
    assert (
        "cannot be moved into ComfyUI's temp folder" in found["full temp"]["said"]
        and "No space left on device" in found["full temp"]["said"]
    )
    assert found["full temp"]["left"] == []
    tried("ENOSPC when a result moves into ComfyUI's temp folder on another disk", 1, "none, one sentence")


# Where a server dies while it saves → what it leaves, and under which name the next one saves.
LEFT = {
    "copying": (["partial"], NAMES[0]),
    "copied": (["partial"], NAMES[0]),
    "named": (["partial", "whole"], NAMES[1]),
    "named without links": (["whole"], NAMES[1]),
    "verifying": (["whole"], NAMES[1]),
}


@pytest.mark.parametrize("point", LEFT)
def test_a_server_that_dies_while_it_saves_leaves_a_whole_file_or_none(host, tmp_path, tried, point):
    left, name = LEFT[point]
    dying = in_process(host, tmp_path, f"saving_dies_{point}")
    assert sorted("partial" if file.endswith(".partial") else "whole" for file in dying) == left
    found = in_process(host, tmp_path, "saving_after_death")
    assert found["found"] == dying and found["whole"] == left.count("whole")
    assert found["saved"] == name and found["files"] == NAMES[: NAMES.index(name) + 1]  # what was being copied is gone
    assert found["verified"].startswith("Verified: ")
    tried("a server killed while it saves", 1, "whole or none; the next save removes the rest")


def test_a_run_and_a_save_that_are_interrupted_anywhere_leave_nothing(host, tmp_path, tried):
    found = in_process(host, tmp_path, "saving_interrupts")
    assert found.pop("afterwards")
    tries = 0
    for point, outcomes in found.items():
        assert any(outcome["interrupted"] for outcome in outcomes), point
        for outcome in outcomes:
            assert outcome["interrupted"] or outcome["same"], (point, outcome)
            assert outcome["left"] == [], (point, outcome)
        tries += len(outcomes)
    tried(
        "ComfyUI's interrupt at a random call of reading, rounding, writing, saving or verifying",
        tries,
        "whole or none",
    )
