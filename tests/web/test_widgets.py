"""The widgets in real pages: what a real run and synthetic events show, in either kind of nodes, on every host."""

import os
import random
from pathlib import Path

import pytest

from learned_rounding.hosts.browser import load_workflow, queue_prompt

pytestmark = pytest.mark.browser

QUANTIZE = 3  # its id in workflow.json

_SEND = """(details) => {
    for (const detail of details)
        window.comfyAPI.api.api.dispatchEvent(new CustomEvent('learned_rounding.progress', {detail}))
}"""

# Two frames: the panel draws in the next one.
_FRAMES = "() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))"

_PANEL = """(root) => {
    const text = (name) => root.querySelector(name)?.innerText ?? ''
    const layer = root.querySelector('.lr-layer')
    const bar = root.querySelector('[role=progressbar]')
    return {
        state: root.dataset.state,
        label: text('.lr-label'), count: text('.lr-count'), first: text('.lr-first'), second: text('.lr-second'),
        layer: layer.hidden ? '' : layer.title,
        percent: Number(bar.getAttribute('aria-valuenow')),
        filled: root.querySelector('.lr-fill').getBoundingClientRect().width / bar.getBoundingClientRect().width,
        worst: [...root.querySelectorAll('.lr-row')].filter((row) => row.checkVisibility())
            .map((row) => [row.querySelector('.lr-name').title, row.querySelector('.lr-error').textContent]),
        overflow: [root.scrollWidth - root.clientWidth, root.scrollHeight - root.clientHeight],
    }
}"""

_BARS = """() => {
    const bar = document.querySelector('.lr-progress [role=progressbar]')
    window.bars = []
    new MutationObserver(() => window.bars.push(Number(bar.getAttribute('aria-valuenow'))))
        .observe(bar, {attributeFilter: ['aria-valuenow']})
}"""


def send(page, *details, node=QUANTIZE):
    page.evaluate(_SEND, [{"node": str(node), **detail} for detail in details])
    page.evaluate(_FRAMES)


def panel(page):
    return page.locator(".lr-progress").evaluate(_PANEL)


def start(total, **more):
    return {
        "state": "start", "source": "model.safetensors", "format": "int8_tensorwise", "granularity": "row",
        "preset": "flux", "total": total, "kept": 3, "bytes_in": 80_000_000, **more,
    }  # fmt: skip


def layer(index, total, error, name="double_blocks.{}.img_attn.qkv.weight", **more):
    return {
        "state": "layer", "index": index, "total": total, "name": name.format(index), "shape": [64, 64],
        "format": "int8_tensorwise", "granularity": "row", "error": error, "seconds": 1.0, "bytes_in": 4_000_000,
        "bytes_out": 2_000_000, "elapsed": index + 1.0, "eta": total - index - 1.0, **more,
    }  # fmt: skip


def test_a_real_run_from_start_to_file(graph, model_file, workflow):
    load_workflow(graph, workflow(seed=random.randrange(1 << 31)))
    os.utime(model_file[1])  # else Load Model is cached from the page before, and reports nothing
    graph.evaluate(_BARS)
    assert queue_prompt(graph)["type"] == "execution_success"
    graph.wait_for_function("() => document.querySelectorAll('.lr-text[data-state=done]').length === 2")
    events = graph.evaluate("() => window.heard")
    assert [event["state"] for event in events] == ["start", *["layer"] * events[0]["total"], "done"]

    shown, done = panel(graph), events[-1]
    assert (shown["state"], shown["percent"], shown["layer"]) == ("done", 100, "")
    assert shown["label"] == "int8_tensorwise per row"
    assert shown["count"] == f"100 % · {done['layers']} / {done['layers']}"
    assert shown["worst"] == [[layer["name"], f"{layer['error']:.5f}"] for layer in done["worst"]]
    assert f"{done['layers']} layers in " in shown["second"]
    assert f"median error {done['median_error']:.5f}" in shown["second"]
    assert shown["overflow"] == [0, 0]

    bars = graph.evaluate("() => window.bars")
    assert bars == sorted(bars) and bars[-1] == 100
    assert any(0 < value < 100 for value in bars), "the bar was never seen on its way"

    loaded, saved = graph.locator(".lr-text").all_inner_texts()
    assert loaded.startswith(f"{model_file[1].name}: ")
    path, verified = saved.splitlines()
    assert Path(path).is_file() and Path(path).suffix == ".safetensors" and verified.startswith("Verified: ")


def test_waits_then_follows_the_layers(graph):
    shown = panel(graph)
    assert (shown["state"], shown["percent"], shown["worst"]) == ("idle", 0, [])
    assert shown["first"] == "Progress appears here while the workflow runs."

    send(graph, start(8), *(layer(index, 8, error) for index, error in enumerate([0.03, 0.01, 0.06, 0.02, 0.05, 0.04])))
    shown = panel(graph)
    assert (shown["state"], shown["percent"], shown["count"]) == ("running", 75, "75 % · 6 / 8")
    assert shown["filled"] == pytest.approx(0.75, abs=0.01)
    assert shown["layer"] == "double_blocks.5.img_attn.qkv.weight"
    assert shown["second"] == "2.0 s left · 4 MB/s"
    assert [error for _, error in shown["worst"]] == ["0.06000", "0.05000", "0.04000", "0.03000", "0.02000"]


def test_interruption_and_error(graph):
    send(graph, start(4), layer(0, 4, 0.01), {"state": "stopped", "reason": "interrupted"})
    shown = panel(graph)
    assert (shown["state"], shown["first"], shown["second"]) == ("stopped", "Interrupted", "after 1 of 4 layers")

    send(graph, start(4), layer(0, 4, 0.01), {"state": "stopped", "reason": "There is no room. " * 40})
    shown = panel(graph)
    assert shown["state"] == "stopped" and shown["first"].startswith("There is no room.")
    assert shown["overflow"] == [0, 0]


def test_long_names_and_kept_layers_stay_inside(graph):
    name = "model.diffusion_model.a_rather_long_name_of_a_family.{}.of_blocks.with.another_long_part.to_out.weight"
    kept = {"state": "kept", "name": "x_embedder.weight", "reason": "holds NaN"}
    send(graph, start(900), kept, *(layer(index, 900, 0.01, name, eta=5000) for index in range(1, 700)))
    shown = panel(graph)
    assert "1 kept" in shown["second"] and len(shown["worst"]) == 5
    assert shown["overflow"] == [0, 0]
    inside, node = graph.evaluate(
        """(id) => {
            const box = (rect) => [rect.left, rect.top, rect.right, rect.bottom]
            const panel = box(document.querySelector('.lr-progress').getBoundingClientRect())
            const drawn = document.querySelector(`[data-node-id="${id}"]`)
            if (drawn) return [panel, box(drawn.getBoundingClientRect())]
            const {canvas, graph} = window.app
            const [x, y, width, height] = graph.getNodeById(id).getBounding()
            const at = (x, y) => canvas.ds.convertOffsetToCanvas([x, y])
            const {left, top} = canvas.canvas.getBoundingClientRect()
            const [[x0, y0], [x1, y1]] = [at(x, y), at(x + width, y + height)]
            return [panel, [left + x0, top + y0, left + x1, top + y1]]
        }""",
        QUANTIZE,
    )
    assert node[0] < inside[0] and node[1] < inside[1] and inside[2] < node[2] and inside[3] < node[3], (inside, node)


def test_events_reach_a_node_in_a_subgraph(graph):
    outer, inner = graph.evaluate(
        """(id) => {
            const {graph, canvas} = window.app
            const {node} = graph.convertToSubgraph(new Set([graph.getNodeById(id)]))
            canvas.setGraph(node.subgraph)
            return [node.id, node.subgraph._nodes[0].id]
        }""",
        QUANTIZE,
    )
    graph.locator(".lr-progress").wait_for(state="visible")
    send(graph, start(2), layer(0, 2, 0.01), node=f"{outer}:{inner}")
    assert panel(graph)["percent"] == 50
    send(graph, layer(1, 2, 0.01), node=f"{outer}:{inner}9")
    assert panel(graph)["percent"] == 50


def test_events_for_nodes_of_another_workflow_are_ignored(graph):
    send(graph, start(2), layer(0, 2, 0.01), node=1)  # here a Load Model
    send(graph, start(2), layer(0, 2, 0.01), node=77)
    send(graph, start(2), layer(0, 2, 0.01), node="77:3")
    assert panel(graph)["state"] == "idle"


def test_widgets_are_no_part_of_workflow_or_prompt(graph):
    send(graph, start(2), layer(0, 2, 0.01))
    saved, prompt = graph.evaluate(
        "async () => [window.app.graph.serialize(), (await window.app.graphToPrompt()).output]"
    )
    values = {node["type"]: node.get("widgets_values") or [] for node in saved["nodes"]}
    assert len(values["LearnedRoundingQuantize"]) == 1
    assert (len(values["LearnedRoundingLoadModel"]), len(values["LearnedRoundingSave"])) == (3, 2)
    assert set(prompt[str(QUANTIZE)]["inputs"]) == {"source", "recipe", "native_int8_kernels"}


def test_the_wheel_zooms_over_a_panel_too(graph):
    graph.locator(".lr-progress").hover()
    before = graph.evaluate("() => window.app.canvas.ds.scale")
    graph.mouse.wheel(0, -200)
    graph.wait_for_function("(before) => window.app.canvas.ds.scale > before", arg=before)


def test_the_console_stays_quiet(graph):
    assert [line for line in graph.problems if "learned_rounding" in line or "lr-" in line] == []
