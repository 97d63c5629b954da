"""Nodes that show what they found, run in real pages: what a user then sees of them, in either kind of nodes, on every host."""

import contextlib
import re
import uuid

import pytest

from learned_rounding.benchmarks.tiny_model.graph import MODEL
from learned_rounding.benchmarks.tiny_model.place import place
from learned_rounding.hosts.browser import SETTINGS, load_workflow, queue_prompt, visit
from learned_rounding.tests.conftest import LINKS
from learned_rounding.tests.nodes.probing import ProbedGraph
from learned_rounding.tests.web.test_progress_widget import node_box, panel, pixels

pytestmark = pytest.mark.browser

# The picture that a node of this type shows: [width, height], once it is loaded.
_PICTURE = """(type) => {
    const node = window.app.graph._nodes.find((node) => node.type === type)
    const drawn = [...document.querySelectorAll(`[data-node-id="${node.id}"] img`)]
    const picture = (window.LiteGraph.vueNodesMode ? drawn : node.imgs ?? []).find(({naturalWidth}) => naturalWidth > 0)
    return picture && [picture.naturalWidth, picture.naturalHeight]
}"""
_FOCUS = """async (type) => {
    const {canvas, graph} = window.app
    const {pos} = graph._nodes.find((node) => node.type === type)
    Object.assign(canvas.ds, {scale: 0.8, offset: [300 - pos[0], 150 - pos[1]]})
    canvas.setDirty(true, true)
}"""


def run(page, graph):
    """The graph, run to its end in the page; the workflow, as the page then has it."""
    load_workflow(page, graph)
    saved = {**page.evaluate("() => window.app.graph.serialize()"), "id": str(uuid.uuid4())}
    load_workflow(page, saved)
    end = queue_prompt(page)
    assert end["type"] == "execution_success", end
    return saved


def picture(page, node):
    page.evaluate(_FOCUS, node)
    return page.wait_for_function(_PICTURE, arg=node).json_value()


def text(page, node):
    """What our text panel on a node says."""
    page.evaluate(_FOCUS, node)
    panel = page.locator(".lr-text[data-state=done]")
    panel.first.wait_for()
    return panel.first.inner_text()


def test_inspect_shows_what_the_file_holds_and_still_does_after_a_reload(comfy, page):
    graph = ProbedGraph()
    graph.add("LearnedRoundingInspect", model=f"diffusion_models/{MODEL}")
    run(page, graph)
    saved = run(page, graph)  # of another workflow, for which ComfyUI has the result at hand
    shown = text(page, "LearnedRoundingInspect")
    assert MODEL in shown
    assert "tensors" in shown
    with contextlib.closing(page.context.new_page()) as again:
        visit(again, comfy)
        load_workflow(again, saved)
        assert text(again, "LearnedRoundingInspect") == shown


def test_a_result_that_was_at_hand_is_summarised(comfy, page):
    """At hand of ComfyUI, in another workflow; of the node, for a copy of itself; of ComfyUI's history, in another page."""
    graph, seed = ProbedGraph(), uuid.uuid4().int % 2**31
    source = graph.source()[0]
    for _ in range(2):
        graph.add("LearnedRoundingReport", quantized=graph.quantize(source, rounding="nearest", seed=seed)[2])

    def summaries(page):
        page.wait_for_function("() => document.querySelectorAll('.lr-progress[data-state=done]').length === 2")
        shown = page.locator(".lr-progress").evaluate_all(
            "(all) => all.map((one) => ['.lr-label', '.lr-first', '.lr-second'].map((name) => one.querySelector(name).innerText))"
        )
        assert shown[0] == shown[1]
        assert all(shown[0])
        return shown

    run(page, graph)
    made = summaries(page)
    saved = run(page, graph)
    assert summaries(page) == made
    with contextlib.closing(page.context.new_page()) as again:
        visit(again, comfy)
        load_workflow(again, saved)
        assert summaries(again) == made


def test_a_cached_run_keeps_its_strip(comfy, page):
    """Of ComfyUI's cache and of the node's own, in the same page, after a reload and in another workflow."""
    graph, seed = ProbedGraph(), uuid.uuid4().int % 2**31
    source = graph.source()[0]
    for _ in range(2):  # the second one uses the result of the first
        graph.add("LearnedRoundingReport", quantized=graph.quantize(source, rounding="nearest", seed=seed)[2])

    def legends(page):
        page.wait_for_function("() => document.querySelectorAll('.lr-progress .lr-legend:not(:empty)').length === 2")
        return page.locator(".lr-legend").all_inner_texts()

    run(page, graph)
    made = legends(page)
    assert made[0] == made[1]
    assert "float8_e4m3fn per tensor" in made[0]
    saved = run(page, graph)
    assert legends(page) == made
    with contextlib.closing(page.context.new_page()) as again:
        visit(again, comfy)
        load_workflow(again, saved)
        assert legends(again) == made


def test_a_run_whose_server_is_restarted_says_how_far_it_came(server_factory, tmp_path, page):
    """And the next run resumes it."""
    place(tmp_path, prompts=("red apple",))
    server = server_factory(base=tmp_path, links=LINKS)
    server.post("/api/settings", {**SETTINGS, "Comfy.VueNodes.Enabled": page.vue_nodes})
    with contextlib.closing(page.context.new_page()) as page:
        visit(page, server)
        graph = ProbedGraph()
        graph.save(graph.quantize(graph.source()[0], rounding="nearest"), "restarted")
        load_workflow(page, graph)
        load_workflow(page, {**page.evaluate("() => window.app.graph.serialize()"), "id": str(uuid.uuid4())})
        server.post("/probe/gate", {"layers": 5})
        assert queue_prompt(page, wait=False)["type"] == "queued"
        page.wait_for_function("() => document.querySelector('.lr-count')?.innerText.includes(' 5 / 37')")
        server.restart()
        page.locator(".lr-progress[data-state=stopped]").wait_for()
        stopped = panel(page)
        assert stopped["first"] == "Stopped at 5 of 37; run again to resume."
        assert stopped["buttons"] == []
        server.post("/probe/gate", {"layers": 4})
        assert queue_prompt(page, wait=False)["type"] == "queued"
        page.wait_for_function("() => / [789] \\/ 37/.test(document.querySelector('.lr-count').innerText)")
        assert re.search(r"s left · .* · resumed at [45] of 37$", panel(page)["second"])
        server.post("/probe/gate", {"layers": None})
        page.locator(".lr-progress[data-state=done]").wait_for()
        assert re.search(r" · [45] of them resumed$", panel(page)["second"])


def test_a_report_in_a_preview_is_a_table_where_the_page_renders_markdown(page):
    graph = ProbedGraph()
    quantized = graph.quantize(graph.source()[0], rounding="nearest", seed=uuid.uuid4().int % 2**31)
    graph.add("PreviewAny", source=quantized[3])
    run(page, graph)
    mode = """() => window.app.graph._nodes.find(({type}) => type === 'PreviewAny')
        .widgets?.find(({name}) => name === 'preview_mode')?.value ?? null"""
    if page.evaluate(mode) is None:
        pytest.skip("this page shows plain text")
    page.wait_for_function(f"({mode})() === true")
    page.evaluate(_FOCUS, "PreviewAny")
    if page.vue_nodes:  # on the canvas ComfyUI shows the Markdown text
        page.get_by_role("cell", name="layers quantized", exact=True).wait_for()


def test_report_shows_its_picture(page):
    graph = ProbedGraph()
    quantized = graph.quantize(graph.source()[0], rounding="nearest", seed=uuid.uuid4().int % 2**31)
    graph.add("LearnedRoundingReport", quantized=quantized[2])
    run(page, graph)
    width, height = picture(page, "LearnedRoundingReport")
    assert width > 300
    assert height > 300


def test_compare_shows_its_plot(page):
    graph = ProbedGraph()
    model = graph.load()
    graph.compare(model[0], graph.quantize(model[0], rounding="nearest")[0], steps=2, seed=uuid.uuid4().int % 2**31)
    run(page, graph)
    width, height = picture(page, "LearnedRoundingCompare")
    assert width > 300
    assert height > 300


def test_calibrate_tells_of_its_steps_and_shows_its_pictures_and_the_file_that_holds_it(comfy, page):
    graph = ProbedGraph()
    calibration = graph.calibrate(graph.load()[0], steps=2, seed=uuid.uuid4().int % 2**31)
    graph.add("LearnedRoundingSaveCalibration", calibration=calibration[0], filename_prefix="from-a-page")
    run(page, graph)
    assert picture(page, "LearnedRoundingCalibrate") == [64, 64]
    done = page.locator(".lr-progress[data-state=done]")
    done.wait_for()
    shown = panel(page)
    assert shown["label"].startswith("calibrated ")
    assert shown["count"].startswith("100 %")
    assert shown["first"].endswith("of each layer's activations")
    assert " in " in shown["second"]
    assert text(page, "LearnedRoundingSaveCalibration").endswith(".calib.safetensors")
    made = max((comfy.output_dir / "calibrations").glob("from-a-page*"), key=lambda path: path.stat().st_mtime)
    graph = ProbedGraph()
    graph.add("PreviewAny", source=graph.add("LearnedRoundingLoadCalibration", file=made.name)[0])
    run(page, graph)
    assert text(page, "LearnedRoundingLoadCalibration").startswith(f"{made.name}: ")


def test_what_is_refused_is_shown_on_its_node(graph):
    """Last in this file: newer pages leave their list of errors open."""
    graph.evaluate(
        "() => { window.app.graph.getNodeById(2).widgets.find(({name}) => name === 'keep').value = '(unclosed' }"
    )
    refused = queue_prompt(graph)
    assert refused["type"] == "refused"
    assert list(refused["data"]["node_errors"]) == ["2"]
    assert [error["extra_info"]["input_name"] for error in refused["data"]["node_errors"]["2"]["errors"]] == ["keep"]
    words = graph.locator(":text('is not a valid regular expression'):not(.lr-preview-error)")  # of ComfyUI
    words.first.wait_for()  # without a click
    if not graph.get_by_role("button", name="View details").count():  # older pages show a dialog
        graph.keyboard.press("Escape")
        words.first.wait_for(state="hidden")
    assert red(graph, 2, "LearnedRoundingConfigure") is True
    assert red(graph, 4, "LearnedRoundingSave") is False


def red(page, node, kind):
    """Whether a node of that type has a red edge."""
    page.evaluate(_FOCUS, kind)
    page.mouse.move(2, 500)
    page.evaluate("() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
    left, top, *_ = node_box(page, node)
    edge = pixels(page, {"x": left - 10, "y": top + 60, "width": 14, "height": 20})
    return any(one > 100 and one > 2 * max(other, third) for one, other, third in edge)
