"""The page of ComfyUI opens, loads and runs a workflow, and is captured, with canvas nodes and with Vue nodes."""

import pytest
from PIL import Image

from learned_rounding.hosts.browser import load_workflow, open_page, queue_prompt, screenshot

pytestmark = pytest.mark.browser


@pytest.mark.parametrize("vue_nodes", [False, True], ids=["canvas-nodes", "vue-nodes"])
def test_page_runs_a_workflow_and_is_captured(comfy, image_workflow, vue_nodes, tmp_path):
    with open_page(comfy, vue_nodes=vue_nodes) as page:
        assert load_workflow(page, image_workflow()) == 3
        assert page.evaluate("() => window.app.graph._nodes.map((node) => node.type)") == [
            "EmptyImage",
            "ImageInvert",
            "SaveImage",
        ]
        assert (page.locator("[data-node-id]").count() > 0) == vue_nodes
        assert queue_prompt(page)["type"] == "execution_success"
        path = screenshot(page, tmp_path / "page.png")
        lefts = page.evaluate("() => window.app.graph._nodes.map((node) => node.pos[0])")
        assert lefts == sorted(set(lefts))  # arranged side by side, although an API workflow has no positions
        with Image.open(path) as image:
            assert image.size == (1600, 1000)
            assert len(image.convert("RGB").getcolors(maxcolors=1 << 24)) > 100  # a blank page has few colors


def test_workflow_in_the_frontends_format_loads(comfy_page, image_workflow):
    load_workflow(comfy_page, image_workflow())
    saved = comfy_page.evaluate("() => window.app.graph.serialize()")
    assert load_workflow(comfy_page, {**saved, "nodes": saved["nodes"][:1], "links": []}) == 1
    assert load_workflow(comfy_page, saved) == 3
    assert queue_prompt(comfy_page)["type"] == "execution_success"


def test_rejected_workflow_is_reported(comfy_page, image_workflow):
    workflow = image_workflow()
    del workflow["2"]["inputs"]["image"]
    load_workflow(comfy_page, workflow)
    assert queue_prompt(comfy_page)["type"] == "refused"
