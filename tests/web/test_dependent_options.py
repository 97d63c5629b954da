"""Only the options that matter for what is chosen show, in either kind of nodes, on every host."""

import itertools
import random

import pytest

from learned_rounding.hosts.browser import load_workflow, queue_prompt
from learned_rounding.quant_core import FORMATS, Recipe
from learned_rounding.quant_core.errors import RecipeError
from learned_rounding.quant_core.formats import GRANULARITIES, with_granularity
from learned_rounding.quant_core.rounding import MODEL_ROUNDINGS

CONFIGURE = 2  # its id in workflow.json
ALWAYS = {"format", "preset", "seed", "rounding", "keep", "heur"}

# Waits until nodes drawn by Vue show as many widgets as are not hidden, and answers with those.
_SHOWN = """async (id) => {
    const node = window.app.graph.getNodeById(id)
    const frame = () => new Promise(requestAnimationFrame)
    const shown = () => node.widgets.filter((widget) => !widget.hidden && (node.showAdvanced || !widget.options.advanced || !window.LiteGraph.vueNodesMode))
    const drawn = () => [...document.querySelectorAll(`[data-node-id="${id}"] .lg-node-widget`)].filter((row) => row.checkVisibility()).length
    for (let frames = 0; frames < 60; frames++) {
        await frame()
        if (!window.LiteGraph.vueNodesMode || drawn() === shown().length) return shown().map(({name}) => name)
    }
    throw new Error(`${drawn()} widgets are drawn, and shown are ${shown().map(({name}) => name)}`)
}"""

# As the page's own widgets set a value.
_CHOOSE = """([id, values]) => {
    const node = window.app.graph.getNodeById(id)
    for (const [name, value] of Object.entries(values)) {
        const widget = node.widgets.find((widget) => widget.name === name)
        widget.value = value
        widget.callback?.(value, window.app.canvas, node)
    }
}"""

# Where the arrow is that takes the next value of a widget on the canvas.
_ARROW = """([id, name]) => {
    const {canvas, graph} = window.app
    const node = graph.getNodeById(id)
    const widget = node.widgets.find((widget) => widget.name === name)
    const {left, top} = canvas.canvas.getBoundingClientRect()
    const [x, y] = canvas.ds.convertOffsetToCanvas([node.pos[0] + node.size[0] - 20, node.pos[1] + widget.last_y + 10])
    return [left + x, top + y]
}"""


def choose(page, node=CONFIGURE, **values):
    page.evaluate(_CHOOSE, [node, values])


def shown(page, node=CONFIGURE):
    """The widgets that a node shows."""
    return set(page.evaluate(_SHOWN, node))


def inputs(page, node=CONFIGURE):
    """What the prompt holds for a node."""
    return page.evaluate("async (id) => (await window.app.graphToPrompt()).output[id].inputs", str(node))


def size(page, node=CONFIGURE):
    return page.evaluate(
        "(id) => { const node = window.app.graph.getNodeById(id); return [node.size[1], node.computeSize()[1]] }", node
    )


@pytest.fixture
def graph(graph):
    graph.evaluate("(id) => { window.app.graph.getNodeById(id).showAdvanced = true }", CONFIGURE)
    return graph


@pytest.mark.browser
def test_the_format_decides_what_shows(graph):
    int8 = ALWAYS | {"granularity", "convrot", "layer_config"}
    assert shown(graph) == int8
    before = size(graph)
    for format, more in {
        "float8_e5m2": {"layer_config"},
        "measured": {"target_size", "target_error", "block_formats", "card", "target_time"},
        "float8_e4m3fn": {"granularity", "full_precision_matrix_mult", "layer_config"},
        "asym_w4a8_int8": {"convrot", "layer_config", "bits"},
        "convrot_w4a4": {"convrot", "layer_config", "linear_dtype"},
        "int8_blockwise": {"granularity", "layer_config"},
    }.items():
        choose(graph, format=format)
        assert shown(graph) == ALWAYS | more, format
        height, needed = size(graph)
        assert height >= needed
    choose(graph, granularity="row")  # which int8_tensorwise has
    assert shown(graph) == int8
    choose(graph, format="int8_tensorwise", granularity="tensor")
    assert shown(graph) == int8 - {"convrot"}
    choose(graph, granularity="auto")
    assert shown(graph) == int8
    if not graph.vue_nodes:
        assert size(graph) == before, "the node has its height again"


@pytest.mark.browser
@pytest.mark.parametrize("rounding", MODEL_ROUNDINGS)
def test_a_rounding_that_runs_the_model_shows_the_card(graph, rounding):
    before = shown(graph)
    choose(graph, rounding=rounding)
    assert shown(graph) == before | {"card"}
    choose(graph, card="9.0")
    assert inputs(graph)["card"] == "9.0"
    choose(graph, rounding="calibrated")
    assert shown(graph) == before
    assert inputs(graph)["card"] == "auto"


@pytest.mark.browser
def test_a_format_chosen_by_mouse(graph):
    assert "convrot" in shown(graph)
    if graph.vue_nodes:
        graph.locator(f'[data-node-id="{CONFIGURE}"]').get_by_text("int8_tensorwise").click()
        graph.get_by_role("option", name="float8_e5m2").click()
    else:
        graph.mouse.click(*graph.evaluate(_ARROW, [CONFIGURE, "format"]))
    graph.wait_for_function(
        "(id) => window.app.graph.getNodeById(id).widgets[0].value !== 'int8_tensorwise'", arg=CONFIGURE
    )
    assert "convrot" not in shown(graph)


@pytest.mark.browser
def test_a_hidden_option_is_kept_and_does_not_make_a_run_fail(graph, workflow):
    load_workflow(graph, workflow(seed=random.randrange(1 << 31), rounding="nearest"))
    choose(graph, convrot="on", granularity="row")
    assert inputs(graph)["convrot"] == "on"
    choose(graph, format="float8_e5m2")
    assert inputs(graph)["convrot"] == "auto"
    assert inputs(graph)["granularity"] == "auto"
    saved = graph.evaluate(
        "(id) => window.app.graph.serialize().nodes.find((node) => node.id === id).widgets_values", CONFIGURE
    )
    assert saved[0] == "float8_e5m2"
    assert saved[1] == "row"
    assert saved[8] == "on"
    assert len(saved) == 17
    assert queue_prompt(graph)["type"] == "execution_success"
    choose(graph, format="int8_tensorwise")
    assert inputs(graph)["convrot"] == "on"
    assert inputs(graph)["granularity"] == "row"


@pytest.mark.browser
def test_workflows_that_are_opened_undone_and_copied(graph, workflow):
    saved = workflow()
    saved["nodes"][1]["widgets_values"] = [
        "measured",
        "row",
        "auto",
        0,
        "auto",
        "",
        False,
        False,
        "on",
        3.5,
        0,
        False,
        "",
    ]
    saved["nodes"][1]["size"] = [360, 500]
    load_workflow(graph, saved)
    graph.evaluate("(id) => { window.app.graph.getNodeById(id).showAdvanced = true }", CONFIGURE)
    measured = ALWAYS | {"target_size", "target_error", "block_formats", "card", "target_time"}
    assert shown(graph) == measured
    if not graph.vue_nodes:
        assert size(graph)[0] == 500, "a saved size is kept"
    assert inputs(graph)["target_size"] == 3.5
    assert inputs(graph)["convrot"] == "auto"
    copied = graph.evaluate(
        """(id) => {
            const {canvas, graph} = window.app
            canvas.selectNodes([graph.getNodeById(id)])
            canvas.copyToClipboard()
            canvas.pasteFromClipboard()
            const node = graph._nodes.filter(({type}) => type === 'LearnedRoundingConfigure').at(-1)
            node.showAdvanced = true
            return node.id
        }""",
        CONFIGURE,
    )
    assert copied != CONFIGURE
    assert shown(graph, copied) == measured
    choose(graph, copied, format="float8_e5m2")
    assert shown(graph, copied) == ALWAYS | {"layer_config"}
    assert shown(graph) == measured
    graph.evaluate("() => window.noteStep()")
    choose(graph, format="int8_tensorwise")
    graph.evaluate(
        """async (id) => {
            const {changeTracker} = window.app.extensionManager.workflow.activeWorkflow
            window.noteStep()
            await changeTracker.undo()
            window.app.graph.getNodeById(id).showAdvanced = true
        }""",
        CONFIGURE,
    )
    assert shown(graph) == measured
    choose(graph, format="float8_e5m2")
    assert shown(graph) == ALWAYS | {"layer_config"}


@pytest.mark.browser
def test_what_is_connected_stays(graph):
    graph.evaluate(
        """(id) => {
            const {graph} = window.app
            const text = window.LiteGraph.createNode('PrimitiveString')
            graph.add(text)
            const node = graph.getNodeById(id)
            text.connect(0, node, node.inputs.findIndex(({name}) => name === 'layer_config'))
        }""",
        CONFIGURE,
    )
    choose(graph, format="measured")
    assert "layer_config" in shown(graph)
    assert isinstance(inputs(graph)["layer_config"], list)
    slot = "(id) => { const node = window.app.graph.getNodeById(id); node.disconnectInput(node.inputs.findIndex(({name}) => name === 'layer_config')) }"
    graph.evaluate(slot, CONFIGURE)
    assert "layer_config" not in shown(graph)
    graph.evaluate(
        """(id) => {
            const {graph} = window.app
            const {node} = graph.convertToSubgraph(new Set([graph.getNodeById(id)]))
            const inner = node.subgraph._nodes[0]
            const slot = inner.inputs.find(({name}) => name === 'format')
            node.subgraph.addInput('format', slot.type).connect(slot, inner)
            window.shownInside = inner.widgets.filter(({hidden}) => !hidden).length
        }""",
        CONFIGURE,
    )
    assert graph.evaluate("() => window.shownInside") == 17, "a format that is chosen outside may be any"


@pytest.mark.browser
def test_an_optimizer_brings_its_options(graph):
    node = graph.evaluate(
        """() => {
            const node = window.LiteGraph.createNode('LearnedRoundingOptions')
            window.app.graph.clear()
            window.app.graph.add(node)
            node.pos = [100, 100]
            return node.id
        }"""
    )
    steps = {"num_iter", "lr", "lr_schedule", "early_stop"}
    before = shown(graph, node)
    assert {"optimizer", "sweeps", "beam_width", "damping"} <= before
    assert not before & (steps | {"calib_samples"})
    choose(graph, node, optimizer="adamw")
    assert shown(graph, node) == before | steps, "rounding reconstructed takes both"
    choose(graph, node, num_iter=20, optimizer="auto")
    assert steps <= shown(graph, node), "a number of steps takes effect without an optimizer too"
    choose(graph, node, num_iter=-1, bias_correction="synthetic")
    assert shown(graph, node) == before | {"calib_samples"}


def matters(conditions, values):
    """As web/dependent_options.js understands them."""

    def holds(name, told):
        return values[name] in told if isinstance(told, list) else values[name] not in told["not"]

    return any(all(holds(*each) for each in condition.items()) for condition in conditions)


def test_what_shows_is_what_a_recipe_does_not_refuse(comfy):
    definition = comfy.object_info("LearnedRoundingConfigure")["LearnedRoundingConfigure"]["input"]
    options = {**definition["required"], **definition["optional"]}
    tried = {
        "convrot": {"convrot": True}, "full_precision_matrix_mult": {"full_precision_matmul": True},
        "target_size": {"target_size": 1.0}, "target_error": {"target_error": 1.0}, "block_formats": {"block_formats": True},
        "layer_config": {"layer_config": '{"a": "skip"}'}, "bits": {"bits": 6}, "linear_dtype": {"linear_dtype": "int4"},
        "card": {"card": "9.0"}, "target_time": {"target_time": 0.8},
    }  # fmt: skip
    roundings = ["auto", *MODEL_ROUNDINGS]
    for format, granularity, rounding in itertools.product([*FORMATS, "measured"], ["auto", *GRANULARITIES], roundings):
        measured = format == "measured"
        own = None if granularity == "auto" or measured else granularity
        resolved = format if measured else with_granularity(format, own)
        recipe = {"format": resolved, "granularity": own, "rounding": rounding}
        if not accepted(**recipe):
            continue
        for name, values in tried.items():
            acts = accepted(**recipe, **values)
            if name == "full_precision_matrix_mult" and format == "float8_e5m2":
                acts = False  # it is so there anyway
            chosen = {"format": format, "granularity": granularity, "rounding": rounding}
            assert matters(options[name][1]["matters_for"], chosen) == acts, (chosen, name)


def accepted(**recipe):
    try:
        return bool(Recipe(**recipe))
    except RecipeError:
        return False
