"""The page of a real ComfyUI opens, loads and runs a workflow, and can be pictured, with either kind of nodes."""

import pytest
from learned_rounding.hosts.browser import load_workflow, open_page, queue_prompt, screenshot
from PIL import Image

pytestmark = pytest.mark.browser


@pytest.mark.parametrize("vue_nodes", [False, True], ids=["canvas-nodes", "vue-nodes"])
def test_page_runs_a_workflow_and_is_pictured(comfy, picture, vue_nodes, tmp_path):
    with open_page(comfy, vue_nodes=vue_nodes) as page:
        assert load_workflow(page, picture()) == 3
        assert page.evaluate("() => window.app.graph._nodes.map((node) => node.type)") == [
            "EmptyImage",
            "ImageInvert",
            "SaveImage",
        ]
        assert (page.locator("[data-node-id]").count() > 0) == vue_nodes
        assert queue_prompt(page)["type"] == "execution_success"
        with Image.open(screenshot(page, tmp_path / "page.png")) as image:
            assert image.size == (1600, 1000)
            assert len(image.convert("RGB").getcolors(maxcolors=1 << 24)) > 100  # a blank page has a handful


def test_a_refused_workflow_is_told(comfy_page, picture):
    workflow = picture()
    del workflow["2"]["inputs"]["image"]
    load_workflow(comfy_page, workflow)
    assert queue_prompt(comfy_page)["type"] == "refused"
