"""ComfyUI's native INT8 layers on this pack's kernels."""

import pytest

from learned_rounding.hosts import HostError
from learned_rounding.hosts.browser import open_page, visit
from learned_rounding.tests.nodes.probing import ProbedGraph, in_process, stock_loads

ROUTE = "/learned_rounding/native_int8"


def test_kernels_run_when_enabled_and_match_comfy_kitchen(host, tmp_path):
    if not stock_loads(host, "int8_tensorwise"):
        pytest.skip(f"ComfyUI {host.version} has no INT8 layers of its own")
    found = in_process(host, tmp_path, "native_int8")
    assert found["needs"] == [["cuda"], [8, 0]] and found["before"] == ["learned_rounding", "eager"]
    assert found["stored"] == [True, False, True, False]
    for name, result in found["models"].items():
        assert result["calls without"] == 0 and result["calls"] >= result["layers"] > 30, (name, result)
        assert result["distance"] < 0.02 and result["off again"], (name, result)
    assert found["calls with the setting"] > 30 and found["calls after it"] == 0
    assert all(distance < 0.005 for distance in found["activations"].values()), found["activations"]


@pytest.mark.browser
def test_setting_of_the_page_reaches_the_server(comfy):
    seen = []
    with open_page(comfy) as page:
        page.on("request", lambda request: seen.append(request.post_data) if ROUTE in request.url else None)
        visit(page, comfy)
        page.wait_for_load_state("networkidle")  # opening a page changes no setting
        for on in ("true", "false"):
            with page.expect_response(lambda response: ROUTE in response.url and response.ok):
                page.evaluate(f"() => window.app.extensionManager.setting.set('LearnedRounding.NativeInt8', {on})")
    assert seen == ["true", "false"]
    assert comfy.get("/api/settings")["LearnedRounding.NativeInt8"] is False


def test_setting_accepts_booleans_only(comfy):
    assert comfy.post(ROUTE, False) is False
    with pytest.raises(HostError):
        comfy.post(ROUTE, "on")


def test_node_rejects_the_option_without_native_int8_layers(comfy, sentences):
    graph = ProbedGraph()
    quantized = graph.quantize(graph.load()[0], "int8_tensorwise")
    graph[quantized.id]["inputs"]["native_int8_kernels"] = True
    graph.probe(quantized[0])
    if stock_loads(comfy.host, "int8_tensorwise"):
        comfy.queue(graph)
    else:
        with sentences.raises(HostError):
            comfy.queue(graph)
