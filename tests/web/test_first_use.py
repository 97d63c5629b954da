"""The first use of the pack as a user does it: search, connect, run, and find the file in the loader, in at most 12 clicks."""

import pytest

from learned_rounding.benchmarks.tiny_model.graph import MODEL
from learned_rounding.hosts.browser import load_workflow
from learned_rounding.tests.web.test_progress_widget import _CONNECTED, _SLOTS
from learned_rounding.tests.web.test_search import INPUT, open_search

pytestmark = pytest.mark.browser

MOST_CLICKS = 12
LOADER = {
    "nodes": [
        {
            "id": 1, "type": "UNETLoader", "pos": [60, 200], "size": [320, 90], "flags": {}, "order": 0, "mode": 0,
            "widgets_values": [MODEL, "default"],
        }
    ],
    "links": [], "version": 0.4, "last_node_id": 1, "last_link_id": 0,
}  # fmt: skip
RUN = "[data-testid=queue-button], .comfyui-queue-button button"
PLACES = {"LearnedRoundingQuantize": (700, 220), "LearnedRoundingSave": (1200, 220)}  # in pixels of the page

_COUNT_CLICKS = """() => {
    window.clicks = 0
    document.addEventListener('pointerdown', () => window.clicks++, true)
}"""
_PLACED = "(type) => window.app.graph._nodes.some((node) => node.type === type && !node.flags?.ghost)"
# Where the loader's list of files is opened.
_LIST = """() => {
    const {canvas, graph} = window.app
    const node = graph.getNodeById(1)
    if (window.LiteGraph.vueNodesMode) {
        const {left, top, width, height} = document.querySelector('[data-node-id="1"] .lg-node-widget').getBoundingClientRect()
        return [left + 0.7 * width, top + height / 2]
    }
    const {left, top} = canvas.canvas.getBoundingClientRect()
    const [x, y] = canvas.ds.convertOffsetToCanvas([node.pos[0] + node.size[0] / 2, node.pos[1] + node.widgets[0].last_y + 10])
    return [left + x, top + y]
}"""
_CHOSEN = "(name) => window.app.graph.getNodeById(1).widgets[0].value === name"


def add_by_search(page, host, word, kind):
    """Double click, type, Enter; newer frontends attach the node to the pointer until a click."""
    open_search(page, PLACES[kind])
    page.locator(INPUT).press_sequentially(word)
    page.locator("[role=option]").filter(has_text="learned_rounding").first.wait_for()
    page.locator(INPUT).press("Enter")
    page.locator(INPUT).wait_for(state="detached")
    if not host.version.startswith("0.3."):
        page.mouse.move(*PLACES[kind], steps=2)
        page.mouse.click(*PLACES[kind])
    page.wait_for_function(_PLACED, arg=kind)


def connect(page, origin, output, target):
    start, end = page.evaluate(_SLOTS, [origin, output, target])
    page.mouse.move(*start)
    page.mouse.down()
    page.mouse.move(*end, steps=5)
    page.mouse.up()
    page.wait_for_function(_CONNECTED, arg=target)


def test_from_the_search_to_the_file_in_the_loader(comfy, page, host):
    load_workflow(page, LOADER)
    page.evaluate("() => Object.assign(window.app.canvas.ds, {scale: 0.8, offset: [60, 60]})")
    page.evaluate(_COUNT_CLICKS)
    add_by_search(page, host, "fp8", "LearnedRoundingQuantize")
    connect(page, "UNETLoader", "MODEL", "LearnedRoundingQuantize")
    add_by_search(page, host, "save quantized", "LearnedRoundingSave")
    connect(page, "LearnedRoundingQuantize", "quantized", "LearnedRoundingSave")
    page.locator(RUN).first.click()
    saved = page.locator(".lr-text[data-state=done]")
    saved.wait_for()
    (file,) = (path.name for path in comfy.output_dir.rglob("*.safetensors") if str(path) in saved.inner_text())
    page.mouse.move(800, 850)
    page.keyboard.press("r")
    page.wait_for_function(
        "(name) => window.app.graph.getNodeById(1).widgets[0].options.values.includes(name)", arg=file
    )
    page.mouse.click(*page.evaluate(_LIST))
    page.get_by_text(file, exact=True).last.click()
    page.wait_for_function(_CHOSEN, arg=file)
    assert page.evaluate("() => window.clicks") <= MOST_CLICKS
