"""In a page: saved files are in the lists of loaders."""

import pytest

from learned_rounding.hosts.browser import load_workflow, queue_prompt

pytestmark = pytest.mark.browser

_ADD = "(type) => { const node = LiteGraph.createNode(type); window.app.graph.add(node); return node.id }"
_VALUE = "([id, name]) => window.app.graph.getNodeById(id).widgets.find((widget) => widget.name === name).value"
_CHOICES = """([id, name]) => {
    const {options} = window.app.graph.getNodeById(id).widgets.find((widget) => widget.name === name)
    return typeof options.values === 'function' ? options.values() : options.values
}"""


def test_a_saved_file_is_in_the_lists_of_loaders_without_a_key(graph, workflow, request):
    load_workflow(graph, workflow(rounding="nearest"))
    name = f"listed-{graph.vue_nodes}".lower()
    graph.evaluate(
        """(name) => {
            const save = window.app.graph._nodes.find(({type}) => type === 'LearnedRoundingSave')
            save.widgets.find((widget) => widget.name === 'filename_prefix').value = name + '/%model%'
        }""",
        name,
    )
    loader = graph.evaluate(_ADD, "UNETLoader")
    assert not any(name in choice for choice in graph.evaluate(_CHOICES, [loader, "unet_name"]))
    assert queue_prompt(graph)["type"] == "execution_success"
    graph.wait_for_function(
        f"([id, name, part]) => ({_CHOICES})([id, name]).some((choice) => choice.includes(part))",
        arg=[loader, "unet_name", name],
    )
    (choice,) = (choice for choice in graph.evaluate(_CHOICES, [loader, "unet_name"]) if name in choice)
    assert choice.replace("\\", "/") == f"{name}/model_int8.safetensors"
