"""Save Quantized reloads its files: valid files are reported as verified, others are renamed and reported."""

import json
from pathlib import Path

import pytest
from PIL import Image

from learned_rounding.hosts import HostError
from learned_rounding.tests.nodes.probing import ProbedGraph, in_process, saved_path, text, unique

DAMAGES = [
    "on disk: a kept tensor",
    "on disk: a bias",
    "on disk: codes",
    "on disk: a scale",
    "on disk: a tensor less",
    "on disk: a tensor more",
    "on disk: another entry",
    "as quantized: no number",
    "as quantized: no entry",
    "as quantized: a tensor less",
    "as quantized: a layer less",
    "as quantized: a tensor more",
    "as quantized: rows less",
    "as quantized: a kept tensor's shape",
    "as quantized: another format",
    "as quantized: another rotation",
    "in ComfyUI: a kept tensor",
    "in ComfyUI: a kept tensor in 8 bits",
    "in ComfyUI: a bias",
    "in ComfyUI: no bias",
    "in ComfyUI: codes",
    "in ComfyUI: a scale",
    "in ComfyUI: another entry",
    "in ComfyUI: another name",
    "in ComfyUI: another shape",
    "in ComfyUI: another output",
]


def test_valid_files_are_verified(host, tmp_path, sentences):
    found = in_process(host, tmp_path, "saving_valid")
    saved, (said, failed, left) = found["found"], found["too little memory"]
    sentences(said)
    assert failed == [] and len(left) == 1
    if host.version == "0.3.75":  # it looks up names that the model's own rules have changed
        said, failed, left = saved.pop("renamed layers")
        sentences(said)
        assert len(failed) == 1 and not left
    for name, (said, failed, left) in saved.items():
        sentences(said)
        assert failed == [] and len(left) == 1, name


@pytest.mark.parametrize("check", ["tampered", "tampered_int8"])
def test_every_damage_is_found_and_the_file_renamed(host, tmp_path, tried, check, sentences):
    found = in_process(host, tmp_path, f"saving_{check}")
    assert list(found) == DAMAGES
    for damage, (said, failed, left) in found.items():
        sentences(said, measured=True)
        assert len(failed) == 1 and failed[0] in said and left == [], damage
    tried(
        "a saved file, or what ComfyUI's loader made of it, is not what was quantized",
        len(found),
        "renamed and reported",
    )


def test_node_reports_the_verification(comfy, request, sentences):
    graph = ProbedGraph()
    saved = graph.save(graph.quantize(graph.source()[0], rounding="nearest"), unique(request))
    result = comfy.queue(graph)
    assert saved_path(result, saved).is_file() and text(result, saved).endswith("_float8_e4m3fn.safetensors")
    sentences(result.outputs[saved.id]["text"][1])


def loader_list(server) -> list[str]:
    """The files that Load Diffusion Model offers."""
    choices, *_ = server.get("/object_info/UNETLoader")["UNETLoader"]["input"]["required"]["unet_name"]
    return choices


def test_file_is_named_after_the_source_model_and_listed_at_once(comfy, request):
    folder, paths = unique(request), []
    for lora in (False, True):
        before = set(loader_list(comfy))
        graph = ProbedGraph()
        model = graph.load()
        source = graph.lora(model[0]) if lora else model
        quantized = graph.quantize(source[0], "int8_tensorwise", rounding="nearest", convrot="auto", seed=int(lora))
        saved = graph.save(quantized, f"{folder}/%model%")
        paths.append(saved_path(comfy.queue(graph), saved))
        (new,) = set(loader_list(comfy)) - before
        assert new.replace("\\", "/") == f"{folder}/{paths[-1].name}"
    stem = Path(graph[model.id]["inputs"]["unet_name"]).stem
    assert [path.name for path in paths] == [
        f"{stem}_int8_convrot.safetensors",
        f"{stem}_int8_convrot_00001_.safetensors",
    ]


@pytest.mark.parametrize(
    "nodes, name",
    [
        (
            {
                "1": {"quantized": ["2", 2]},
                "2": {"source": ["3", 0]},
                "3": {"model_file": "diffusion_models/a/flux.gguf"},
            },
            "flux",
        ),
        (
            {
                "1": {"quantized": ["2", 2]},
                "2": {"source": ["3", 0]},
                "3": {"lora_name": "x.safetensors", "model": ["4", 0]},
                "4": {"unet_name": "m-00001-of-00002.safetensors"},
            },
            "m",
        ),
        (
            {
                "1": {"quantized": ["2", 2]},
                "2": {"recipe": ["5", 0], "source": ["3", 1]},
                "3": {"clip_name1": "a\\t5.xxl.safetensors", "clip_name2": "b.safetensors"},
            },
            "t5.xxl",
        ),
        ({"1": {"quantized": ["2", 0]}, "2": {"any": ["3", 0]}, "3": {"text": "no model"}}, "model"),
        ({"1": {"quantized": ["1", 0]}}, "model"),
    ],
    ids=["file", "LoRA", "text encoders", "unknown", "circle"],
)
def test_source_model_is_found_through_the_graph(host, tmp_path, nodes, name):
    (tmp_path / "nodes.json").write_text(json.dumps(nodes))
    assert in_process(host, tmp_path, "saving_names") == {"named": f"sub/{name}_x", "plain": "mine"}


def test_full_disk_leaves_no_partial_save(host, tmp_path, tried, sentences):
    found = in_process(host, tmp_path, "failing_full_disk")
    sentences(found["said"])
    assert found["left"] == []
    assert found["afterwards"] == ["full_first_label.safetensors", "full_second_label.safetensors"]
    tried("ENOSPC when Save Quantized copies", 1, "none, one sentence, next run works")


NAMES = ["verified_float8_e4m3fn.safetensors", "verified_float8_e4m3fn_00001_.safetensors"]


def test_saving_on_other_disks_never_overwrites(host, tmp_path, tried, sentences):
    found = in_process(host, tmp_path, "failing_other_disks")
    for disk in ("another disk", "a disk without links"):
        saved = found[disk]
        assert saved["names"] == saved["files"] == NAMES and saved["same"] and saved["copies"], disk
        sentences(saved["verified"])
    assert found["temp"] == {"same": True, "moves": 1, "left": []}
    sentences(found["full temp"]["said"])
    assert found["full temp"]["left"] == []
    tried("ENOSPC when a result moves into ComfyUI's temp folder on another disk", 1, "none, one sentence")


# Point at which a server is killed while it saves → (files that it leaves, name of the next save).
LEFT = {
    "copying": (["partial"], NAMES[0]),
    "copied": (["partial"], NAMES[0]),
    "named": (["partial", "whole"], NAMES[1]),
    "named without links": (["whole"], NAMES[1]),
    "verifying": (["whole"], NAMES[1]),
}


@pytest.mark.parametrize("point", LEFT)
def test_kill_during_saving_leaves_a_complete_file_or_none(host, tmp_path, tried, point, sentences):
    left, name = LEFT[point]
    dying = in_process(host, tmp_path, f"failing_dies_{point}")
    assert sorted("partial" if file.endswith(".partial") else "whole" for file in dying) == left
    found = in_process(host, tmp_path, "failing_after_death")
    assert found["found"] == dying and found["whole"] == left.count("whole")
    assert found["saved"] == name and found["files"] == NAMES[: NAMES.index(name) + 1]  # the partial copy is deleted
    sentences(found["verified"])
    tried("a server killed while it saves", 1, "whole or none; the next save removes the rest")


def test_interrupt_during_run_or_save_leaves_no_files(host, tmp_path, tried):
    found = in_process(host, tmp_path, "failing_interrupts")
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


def add_card(graph, prefix, format="int8_tensorwise", **options):
    """Add Save Quantized with a quality card, and Compare."""
    model = graph.load()
    quantized = graph.quantize(model[0], format, rounding="nearest", **options)
    compared = graph.compare(model[0], quantized[0], steps=2)
    node = graph.save(quantized, prefix)
    graph[node.id]["inputs"] |= {"quality_card": True, "comparison": compared[4]}
    return node


def test_quality_card_is_written_beside_the_file(comfy, request):
    graph = ProbedGraph()
    node = add_card(graph, unique(request))
    result = comfy.queue(graph)
    saved = saved_path(result, node)
    assert f"{saved.stem}.png and {saved.stem}.md" in result.outputs[node.id]["text"][2]
    written = saved.with_suffix(".md").read_text(encoding="utf-8")
    assert written.startswith(f"# {saved.stem}\n\n![Quality card]({saved.stem}.png)\n")
    for fact in ("int8_tensorwise per row", "37 quantized", "PSNR (dB)", "weight memory"):
        assert fact in written
    with Image.open(saved.with_suffix(".png")) as image:
        assert image.format == "PNG" and image.width == 1200 and image.height > 1200


def test_without_a_comparison_the_card_has_no_images(comfy, request):
    graph = ProbedGraph()
    node = graph.save(graph.quantize(graph.source()[0], rounding="nearest"), unique(request))
    graph[node.id]["inputs"]["quality_card"] = True
    saved = saved_path(comfy.queue(graph), node)
    assert "PSNR" not in saved.with_suffix(".md").read_text(encoding="utf-8")
    with Image.open(saved.with_suffix(".png")) as image:
        assert image.height < 1200


def test_no_card_is_written_unasked(comfy, request):
    graph = ProbedGraph()
    node = graph.save(graph.quantize(graph.source()[0], rounding="nearest"), unique(request))
    saved = saved_path(comfy.queue(graph), node)
    assert [path.name for path in saved.parent.glob(f"{saved.stem}*")] == [saved.name]


def test_a_card_that_cannot_be_written_leaves_nothing_and_keeps_the_file(comfy, request):
    graph = ProbedGraph()
    node = graph.save(graph.quantize(graph.source()[0], rounding="nearest"), unique(request))
    saved = saved_path(comfy.queue(graph), node)
    saved.unlink()  # its name is free again
    occupied = saved.with_suffix(".md")
    occupied.write_text("of another model")
    graph[node.id]["inputs"]["quality_card"] = True
    with pytest.raises(HostError, match=r"belongs to another file.*is complete and verified"):
        comfy.queue(graph)
    assert {path.name for path in saved.parent.glob(f"{saved.stem}*")} == {occupied.name, saved.name}
    assert occupied.read_text() == "of another model" and not list(saved.parent.glob(".*.partial"))
