"""In a page: new nodes rotate by default, and nodes of old workflows do not."""

import pytest

from learned_rounding.hosts.browser import load_workflow

pytestmark = pytest.mark.browser

_ADD = "(type) => { const node = LiteGraph.createNode(type); window.app.graph.add(node); return node.id }"
_VALUE = "([id, name]) => window.app.graph.getNodeById(id).widgets.find((widget) => widget.name === name).value"


def test_new_nodes_rotate_by_default_and_old_workflows_do_not(graph, workflow):
    new = graph.evaluate(_ADD, "LearnedRoundingConfigure")
    assert graph.evaluate(_VALUE, [new, "convrot"]) == "auto"
    save = graph.evaluate(_ADD, "LearnedRoundingSave")
    assert graph.evaluate(_VALUE, [save, "filename_prefix"]) == "%model%"
    old = workflow()
    (configure,) = (node for node in old["nodes"] if node["type"] == "LearnedRoundingConfigure")
    configure["widgets_values"] = configure["widgets_values"][:8]  # before the widget existed
    load_workflow(graph, old)
    assert graph.evaluate(_VALUE, [configure["id"], "convrot"]) == "off"
