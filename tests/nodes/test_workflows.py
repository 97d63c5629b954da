"""The shipped workflows run with the tiny model in place of the public ones that they name, and explain what to choose."""

import itertools
import json

import pytest
from PIL import Image

from learned_rounding.benchmarks.tiny_model.examples import (
    DROPPED,
    EXAMPLES,
    FILES,
    REPLACED,
    VALUES,
    place_further,
    with_tiny_model,
)
from learned_rounding.benchmarks.tiny_model.graph import pictures, psnr
from learned_rounding.hosts.workflows import to_api
from learned_rounding.quant_core.output import verify_file

TITLE = 30  # height of a node's title above its position
WORKFLOWS = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(EXAMPLES.glob("*.json"))}


@pytest.fixture(scope="module")
def further_files(comfy):
    place_further(comfy.base)


@pytest.mark.usefixtures("further_files")
@pytest.mark.parametrize("name", WORKFLOWS)
def test_example_runs_with_the_tiny_model(comfy, name, sentences):
    workflow = with_tiny_model(name, comfy.object_info())
    for kind in ("original", "quantized"):  # of other workflows on this server
        for path in comfy.output_dir.glob(f"{kind}_*.png"):
            path.unlink()
    result = comfy.queue(to_api(workflow, comfy.object_info()), timeout=900)
    shown = [entry["text"] for entry in result.outputs.values() if "text" in entry]
    texts = [text[0] for text in shown]
    saved = [text for text in shown if text[0].endswith(".safetensors")]
    assert len(saved) == 1
    assert verify_file(saved[0][0]).layers > 30
    sentences(saved[0][1], measured=True)
    assert any("layers quantized" in text for text in texts)
    if any(node["type"] == "LearnedRoundingCompare" for node in workflow["nodes"]):
        (means,) = (line for text in texts for line in text.splitlines() if line.startswith("| mean |"))
        assert float(means.split(" | ")[2]) > 30  # PSNR
    if any(node["widgets_values"] == ["original"] for node in workflow["nodes"]):
        assert psnr(pictures(comfy.output_dir, "original"), pictures(comfy.output_dir, "quantized")) > 20


def test_examples_have_the_slots_of_the_nodes(comfy):
    """Slots in the files are those of the nodes: a page keeps the slots of a file."""
    known = comfy.object_info()
    for workflow in WORKFLOWS.values():
        for node in workflow["nodes"]:
            if node["type"] != "MarkdownNote":
                info = known[node["type"]]
                inputs = {name: kind for group in info["input"].values() for name, (kind, *_) in group.items()}
                assert [slot["type"] for slot in node["inputs"]] == [inputs[slot["name"]] for slot in node["inputs"]]
                outputs = [{key: slot[key] for key in ("name", "type")} for slot in node["outputs"]]
                assert outputs in (
                    [],
                    [
                        {"name": name, "type": kind}
                        for name, kind in zip(info["output_name"], info["output"], strict=True)
                    ],
                )


@pytest.mark.parametrize("name", WORKFLOWS)
def test_example_is_for_users(name):
    """An example has stock loaders and nodes of both hosts, public files with their addresses, and a note for the user."""
    nodes = WORKFLOWS[name]["nodes"]
    notes = [node["widgets_values"][0] for node in nodes if node["type"] == "MarkdownNote"]
    assert len(notes) == 1
    assert "Choose your" in notes[0]
    assert len(notes[0]) > 200
    for node in nodes:
        files = [value for value in node["widgets_values"] if isinstance(value, str) and value.endswith(".safetensors")]
        models = node["properties"].get("models", [])
        assert [model["name"] for model in models] == files  # pages look a model up by the value of the widget
        for model in models:
            file = model["name"].rpartition("/")[2]
            assert model["url"].startswith("https://huggingface.co/")
            assert model["url"].endswith(f"/{file}")
            assert model["name"] in (file, f"{model['directory']}/{file}")
    if not any(node["type"] == "LearnedRoundingLoadModel" for node in nodes):
        assert {"UNETLoader", "CLIPLoader", "VAELoader", "CLIPTextEncode", "EmptySD3LatentImage"} <= {
            node["type"] for node in nodes
        }


def _contains(group, node) -> bool:
    (x, y, width, height), (left, top), (wide, high) = group["bounding"], node["pos"], node["size"]
    return x <= left and y <= top - TITLE and left + wide <= x + width and top + high <= y + height


@pytest.mark.parametrize("name", WORKFLOWS)
def test_groups_of_an_example_are_its_steps(name):
    """Numbered groups in the order of use; each node but the note is in one of them, and nothing overlaps."""
    nodes, groups = WORKFLOWS[name]["nodes"], WORKFLOWS[name]["groups"]
    assert [group["title"].split()[0] for group in groups] == [str(index + 1) for index in range(len(groups))]
    assert groups[0]["title"] == "1 Load"
    assert any(group["title"].endswith(" Quantize") for group in groups)
    for before, after in itertools.pairwise(groups):
        assert before["bounding"][0] + before["bounding"][2] < after["bounding"][0]
    for node in nodes:
        assert sum(_contains(group, node) for group in groups) == (node["type"] != "MarkdownNote"), node["type"]
    for one, other in itertools.combinations(nodes, 2):
        apart = (
            abs(2 * (one["pos"][axis] - other["pos"][axis]) + one["size"][axis] - other["size"][axis])
            - (one["size"][axis] + other["size"][axis])
            for axis in (0, 1)
        )
        assert max(space - 2 * TITLE * axis for axis, space in enumerate(apart)) >= 0, (one["type"], other["type"])


def test_examples_are_numbered_in_the_order_of_use():
    """The first is the one of the README."""
    names = list(WORKFLOWS)
    assert [name.split()[0] for name in names] == [str(index + 1) for index in range(len(names))]
    assert f"→ {names[0]}*" in (EXAMPLES.parent / "README.md").read_text(encoding="utf-8")


def _workflow_of(picture) -> dict:
    with Image.open(picture) as opened:
        return json.loads(opened.text["workflow"])


def test_every_substitution_is_needed():
    """Needed by an example, or by the workflow of a picture in the help."""
    workflows = [*WORKFLOWS.values(), *map(_workflow_of, (EXAMPLES.parent / "web" / "docs" / "images").glob("*.png"))]
    nodes = [node for workflow in workflows for node in workflow["nodes"]]
    values = {value for node in nodes for value in node.get("widgets_values") or () if isinstance(value, str)}
    assert set(FILES) <= {value.split("/")[-1] for value in values}
    assert {*VALUES, *REPLACED, *DROPPED} <= {node["type"] for node in nodes}


def test_template_browser_lists_the_examples_with_images(comfy):
    listed = comfy.get("/workflow_templates")
    assert set(WORKFLOWS) == set(listed["learned_rounding"])
    for name in WORKFLOWS:
        with Image.open(EXAMPLES / f"{name}.jpg") as picture:
            assert picture.format == "JPEG"
            assert min(picture.size) >= 360
