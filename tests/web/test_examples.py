"""The shipped examples in a page, as a user opens them from the template browser: complete, with every value where it belongs."""

import pytest

from learned_rounding.benchmarks.tiny_model.examples import EXAMPLES
from learned_rounding.hosts.browser import load_workflow

pytestmark = pytest.mark.browser

NAMES = sorted(path.stem for path in EXAMPLES.glob("*.json"))

# Opened as the template browser does it; what is there then, and what the page says about it.
_OPEN = """async (name) => {
    const workflow = await (await fetch(`/api/workflow_templates/learned_rounding/${name}.json`)).json()
    await window.app.loadGraphData(workflow, true, true, name)
    await new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))
    const {graph} = window.app
    const values = (node) => (node.widgets ?? []).filter((widget) => widget.serialize !== false).map((widget) => widget.value)
    return {
        unknown: graph._nodes.filter((node) => !(node.type in LiteGraph.registered_node_types)).map((node) => node.type),
        links: [graph.links.size, workflow.links.length],
        loose: graph._nodes.flatMap((node) => (node.inputs ?? []).filter((slot) => slot.link !== null && !graph.links.get(slot.link))).length,
        shown: graph._nodes.map((node) => [String(node.id), node.type, values(node)]),
        saved: workflow.nodes.map((node) => [String(node.id), node.type, node.widgets_values]),
    }
}"""
# Pages ask other sites how large the models are and where nodes come from; the server of the tests keeps them from it.
_OUTSIDE = "Error fetching file size"
_MISSING_NODES = "[aria-labelledby=global-missing-nodes], .comfy-missing-nodes"


@pytest.mark.parametrize("name", NAMES)
def test_an_example_opens_with_all_its_nodes_and_values(page, name):
    load_workflow(page, {"nodes": [], "links": [], "version": 0.4})
    page.problems.clear()
    opened = page.evaluate(_OPEN, name)
    assert opened["unknown"] == []
    assert opened["loose"] == 0
    assert len(set(opened["links"])) == 1
    assert opened["links"][0]
    shown = {node_id: (kind, values) for node_id, kind, values in opened["shown"]}
    for node_id, kind, values in opened["saved"]:
        assert shown[node_id][0] == kind
        assert shown[node_id][1][: len(values)] == values, kind
    assert page.locator(_MISSING_NODES).count() == 0
    assert [
        line for line in page.problems if not line.startswith(_OUTSIDE) and "Content Security Policy" not in line
    ] == []


def test_templates_are_listed_in_the_order_of_their_numbers(page):
    listed = page.evaluate("async () => (await window.comfyAPI.api.api.getWorkflowTemplates()).learned_rounding")
    assert listed == NAMES
