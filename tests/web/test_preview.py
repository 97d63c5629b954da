"""The preview on Learned Round Quantize: what the page shows before anything runs."""

import pytest

from learned_rounding.hosts.browser import load_workflow, queue_prompt

pytestmark = pytest.mark.browser

_ROWS = """() => {
    const panel = document.querySelector('.lr-progress')
    return panel?.dataset.state === 'idle' ? [...panel.querySelectorAll('.lr-preview dt, .lr-preview dd')].map((row) => row.innerText) : null
}"""
_CHOOSE = """([type, name, value]) => {
    const node = window.app.graph._nodes.find((node) => node.type === type)
    const widget = node.widgets.find((widget) => widget.name === name)
    widget.value = value
    widget.callback?.(value)
    window.noteStep()
}"""


@pytest.fixture
def show(page, workflow):
    """show(changes to the graph) → the rows of the preview of the workflow, when they are there."""

    def make(change=lambda graph: None):
        graph = workflow()
        change(graph)
        load_workflow(page, graph)
        page.wait_for_function(f"() => ({_ROWS})()?.length")
        return page.evaluate(_ROWS)

    return make


def test_the_preview_is_there_before_a_run_and_follows_the_format(show, page, model_file):
    rows = dict(zip(*[iter(show())] * 2, strict=True))
    assert list(rows) == ["Size", "Layers", "Time", "Stock ComfyUI"]
    assert rows["Size"].endswith("% smaller")
    assert "quantized" in rows["Layers"]
    assert rows["Time"].endswith("(estimate)")
    assert rows["Stock ComfyUI"].startswith("int8_tensorwise per row: ")
    page.evaluate(_CHOOSE, ["LearnedRoundingConfigure", "format", "float8_e4m3fn"])
    page.wait_for_function(f"() => ({_ROWS})()?.at(-1).startsWith('float8_e4m3fn per tensor: ')")
    assert page.evaluate(_ROWS)[-1].endswith("decoded here, saves memory only")  # of a CPU


def test_the_size_is_that_of_the_run(show, page):
    size = show()[1]
    assert queue_prompt(page)["type"] == "execution_success"
    page.locator(".lr-progress[data-state=done]").wait_for()
    assert page.locator(".lr-first").inner_text().startswith(size)
    assert not page.locator(".lr-preview").is_visible()


def test_a_damaged_file_is_refused_in_one_sentence(show, comfy, model_file):
    damaged = comfy.models_dir / "diffusion_models" / "damaged.safetensors"
    damaged.write_bytes(b"\x40\0\0\0\0\0\0\0{")

    def choose(graph):
        graph["nodes"][0]["widgets_values"][0] = f"diffusion_models/{damaged.name}"

    (sentence,) = show(choose)
    assert damaged.name in sentence
    assert str(damaged.parent) not in sentence


def test_the_model_of_a_loader_has_a_preview_too(show, model_file):
    def replace_loader(graph):
        loader = {
            "id": 1, "type": "UNETLoader", "pos": [0, 0], "size": [360, 90], "flags": {}, "order": 0, "mode": 0, "inputs": [],
            "outputs": [{"name": "MODEL", "type": "MODEL", "links": [4]}], "properties": {},
            "widgets_values": [model_file[1].name, "default"],
        }  # fmt: skip
        graph["nodes"][0] = loader
        graph["links"][0] = [4, 1, 0, 3, 0, "MODEL"]

    assert show(replace_loader)[0] == "Size"


def test_without_a_file_there_is_none(page, workflow):
    graph = workflow()
    graph["nodes"], graph["links"] = graph["nodes"][1:3], graph["links"][1:2]
    graph["nodes"][1]["inputs"][0]["link"] = None
    load_workflow(page, graph)
    page.locator(".lr-progress").wait_for(state="visible")
    assert page.evaluate(_ROWS) == []
    assert page.locator(".lr-first").inner_text() == "Progress appears here while the workflow runs."
