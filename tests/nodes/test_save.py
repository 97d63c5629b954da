"""Save Quantized in a workflow: names of files, what the node shows, quality cards."""

from pathlib import Path

import pytest
from PIL import Image

from learned_rounding.hosts import HostError
from learned_rounding.tests.nodes.probing import ProbedGraph, saved_path, text, unique


def test_node_reports_the_verification(comfy, request, sentences):
    graph = ProbedGraph()
    saved = graph.save(graph.quantize(graph.source()[0], rounding="nearest"), unique(request))
    result = comfy.queue(graph)
    assert saved_path(result, saved).is_file()
    assert text(result, saved).endswith("_float8_e4m3fn.safetensors")
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
        assert image.format == "PNG"
        assert image.width == 1200
        assert image.height > 1200


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
    assert occupied.read_text() == "of another model"
    assert not list(saved.parent.glob(".*.partial"))
