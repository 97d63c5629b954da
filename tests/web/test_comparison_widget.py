"""The table on Compare, in a real page."""

import pytest

from learned_rounding.benchmarks.tiny_model.graph import TinyGraph
from learned_rounding.benchmarks.tiny_model.place import place
from learned_rounding.hosts.browser import load_workflow, queue_prompt, visit

pytestmark = pytest.mark.browser

_CELLS = (
    """(table) => [...table.querySelectorAll('tr')].map((row) => [...row.children].map((cell) => cell.innerText))"""
)
_SIZE = "(element) => [element.scrollWidth - element.clientWidth, parseFloat(getComputedStyle(element).fontSize)]"


@pytest.fixture
def comparison(comfy, page):
    place(
        comfy.base, output_dir=comfy.output_dir, prompts=("red apple", "owl")
    )  # as for the other tests of this server
    graph = TinyGraph()
    model = graph.load()
    quantized = graph.quantize(model[0], "float8_e4m3fn", rounding="nearest")
    graph.compare(model[0], quantized[0], steps=2, seed=int(page.vue_nodes))
    return graph


def test_compare_shows_metrics_memory_time_and_activations(page, comfy, comparison):
    visit(page, comfy)  # the file lists have the tiny model now
    load_workflow(page, comparison)
    panel = page.locator(".lr-comparison")
    assert queue_prompt(page)["type"] == "execution_success"
    page.locator(".lr-comparison[data-state=done]").wait_for()
    header, *rows = panel.locator("table").evaluate(_CELLS)
    assert header == ["", "reference", "compared"]
    table = {name: values for name, *values in rows}
    assert list(table)[:2] == ["latent SNR (dB)", "PSNR (dB)"]
    before, after = (float(text.split()[0]) for text in table["weight memory"])
    assert 3 < before / after < 4
    assert all("s" in text for text in table["time per step"])
    assert table["activations"] == ["not quantized", "not quantized"]
    assert panel.locator(".lr-note").inner_text().startswith("float8_e4m3fn: decoded on this device")
    assert panel.evaluate(_SIZE) == [0, 12]
