"""The menu entry "Quantize this model", in either kind of nodes, on every host."""

import itertools

import pytest

from learned_rounding.hosts.browser import load_workflow

pytestmark = pytest.mark.browser

ENTRY = "Quantize this model"
ADDED = ["LearnedRoundingConfigure", "LearnedRoundingQuantize", "LearnedRoundingSave"]
LINKS = [
    ["LearnedRoundingConfigure", "recipe", "LearnedRoundingQuantize", "recipe"],
    ["LearnedRoundingQuantize", "quantized", "LearnedRoundingSave", "quantized"],
]
# Node: the output that is quantized.
SOURCES = {"UNETLoader": "MODEL", "CheckpointLoaderSimple": "MODEL", "CLIPLoader": "CLIP"}

_TITLE = """(type) => {
    const {canvas, graph} = window.app
    const {pos} = graph._nodes.find((node) => node.type === type)
    const {left, top} = canvas.canvas.getBoundingClientRect()
    const [x, y] = canvas.ds.convertOffsetToCanvas([pos[0] + 60, pos[1] - 12])
    return [left + x, top + y]
}"""
# Older frontends measure Vue nodes for some frames, and move them.
_STILL = """async () => {
    for (let same = 0, before = ''; same < 20; ) {
        await new Promise(requestAnimationFrame)
        const now = window.app.graph._nodes.map(({pos, size}) => [...pos, ...size]).join()
        same = now === before ? same + 1 : 0
        before = now
    }
}"""
_STATE = """() => {
    const {graph} = window.app
    return {
        boxes: graph._nodes.map(({type, pos, size}) => [type, pos[0], pos[1] - 30, size[0], size[1] + 30]),
        links: [...graph.links.values()].map(({origin_id, origin_slot, target_id, target_slot}) => {
            const [from, to] = [graph.getNodeById(origin_id), graph.getNodeById(target_id)]
            return [from.type, from.outputs[origin_slot].name, to.type, to.inputs[target_slot].name]
        }),
    }
}"""
_COUNT = "(count) => window.app.graph._nodes.length === count && !window.app.extensionManager.workflow.activeWorkflow.changeTracker.changeCount"


def neighbours(source, renderer):
    """A graph with the source, and nodes to its right and below, made by one kind of nodes."""
    kinds = [(source, [100, 200]), ("KSampler", [420, 200]), ("LoadImage", [100, 480]), ("KSampler", [800, 420])]
    nodes = [
        {"id": index, "type": kind, "pos": pos, "size": [270, 200], "flags": {}, "order": index, "mode": 0}
        for index, (kind, pos) in enumerate(kinds, 1)
    ]
    extra = {"ds": {"scale": 0.8, "offset": [150, 150]}, "workflowRendererVersion": renderer}
    return {"nodes": nodes, "links": [], "extra": extra, "version": 0.4, "last_node_id": len(nodes), "last_link_id": 0}


def choose_entry(page, host, kind):
    """In the menu of the node; older frontends have no entries of extensions for Vue nodes, but the button in the toolbox."""
    page.evaluate(_STILL)
    has_menu = not page.vue_nodes or not host.version.startswith("0.3.")
    page.mouse.click(*page.evaluate(_TITLE, kind), button="right" if has_menu else "left")
    entry = page.get_by_text(ENTRY, exact=True) if has_menu else page.locator(".selection-toolbox .pi-box")
    entry.click()


def overlaps(one, other):
    (_, x, y, width, height), (_, left, top, wide, high) = one, other
    return x < left + wide and left < x + width and y < top + high and top < y + height


@pytest.mark.parametrize("source", SOURCES)
def test_the_entry_inserts_connected_nodes_as_one_step(page, host, source):
    load_workflow(page, neighbours(source, "Vue" if page.vue_nodes else "LG"))
    choose_entry(page, host, source)
    page.wait_for_function(_COUNT, arg=7)
    state = page.evaluate(_STATE)
    assert sorted(kind for kind, *_ in state["boxes"][4:]) == ADDED
    assert sorted(state["links"]) == sorted([[source, SOURCES[source], "LearnedRoundingQuantize", "source"], *LINKS])
    boxes = state["boxes"]
    assert not [pair for pair in itertools.combinations(boxes, 2) if pair[1] in boxes[4:] and overlaps(*pair)]
    page.keyboard.press("Control+z")
    page.wait_for_function(_COUNT, arg=4)
    assert page.evaluate(_STATE)["links"] == []


def test_the_entry_is_where_a_model_or_clip_comes_out_of_a_node(page):
    found = page.evaluate(
        """(entry) => {
            const kinds = ['UNETLoader', 'CLIPLoader', 'LoraLoader', 'CheckpointLoaderSimple', 'KSampler', 'VAELoader',
                'LearnedRoundingQuantize', 'LearnedRoundingLoadQuantized']
            return kinds.filter((kind) => window.app.collectNodeMenuItems(LiteGraph.createNode(kind)).some((item) => item?.content === entry))
        }""",
        ENTRY,
    )
    assert found == ["UNETLoader", "CLIPLoader", "LoraLoader", "CheckpointLoaderSimple"]
