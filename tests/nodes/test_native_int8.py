"""ComfyUI's native INT8 layers on this pack's kernels."""

import pytest

from learned_rounding.hosts import HostError
from learned_rounding.hosts.browser import open_page, visit
from learned_rounding.tests.nodes.probing import ProbedGraph, in_process, stock_loads

ROUTE = "/learned_rounding/native_int8"
MODES = ["auto", "on", "off"]


@pytest.fixture(scope="module")
def int8_host(host):
    """A host with INT8 layers of its own."""
    if not stock_loads(host, "int8_tensorwise"):
        pytest.skip(f"ComfyUI {host.version} has no INT8 layers of its own")
    return host


@pytest.fixture(scope="module")
def layers(int8_host, tmp_path_factory):
    """What the checks without a model found, by check."""
    return in_process(int8_host, tmp_path_factory.mktemp("native"), "native_layers")


def test_stored_setting_decides_where_our_kernels_can_run(layers):
    found = layers["stored"]
    assert found["without a GPU"] == ["off", False]
    modes = ["on", "off", "auto", "on", "auto", "auto", "auto", "auto", "auto", "auto"]
    assert found["modes"] == [[mode, mode != "off"] for mode in modes]


def test_registry_offers_our_backend_only_what_it_supports(layers):
    found = layers["constraints"]
    assert found == {"needs": [["cuda"], [8, 0], ["x"]], "order": ["learned_rounding", "eager"]}


def calls(ours=0, stock=0, searches=0, measured=0):
    return {"ours": ours, "stock": stock, "searches": searches, "measured": measured}


def test_each_mode_runs_its_implementation(layers):
    found = layers["modes"]
    assert len(found) == 12
    for name, result in found.items():
        assert result["calls"] == {
            "off": [calls(stock=1, searches=1)] * 2,
            "on": [calls(ours=1)] * 2,
            "auto": [calls(ours=2, stock=1, measured=1), calls(ours=1)],  # the measurement runs both
            "auto, stock is faster": [calls(ours=1, stock=2, measured=1), calls(stock=1)],
        }, name
        assert result["distance"] < 0.005 and result["stock's result"], (name, result)
        assert result["transposed"] == ["inference False" in name], name  # linear, or mm and addmm


def test_w4a8_layers_run_in_each_mode(int8_host, layers):
    found = layers["w4a8"]
    assert len(found) == 8 * stock_loads(int8_host, "asym_w4a8_int8")
    for name, result in found.items():
        ours = {
            "off": [calls(stock=1, searches=1)] * 2,
            "on": [calls(ours=1)] * 2,
            "auto": [calls(ours=2, stock=1, measured=1), calls(ours=1)],
        }
        stock = {
            **ours,
            "on": [calls(stock=1)] * 2,
            "auto": [calls(stock=1)] * 2,
        }  # our kernels do not support the layer
        assert result["calls"] == (stock if "asymmetric" in name else ours), name
        assert result["distance"] < 0.005, (name, result)
        assert result["transposed"] == ["inference False" in name], name


def test_fused_activations_run_in_every_mode(layers):
    found = layers["activations"]
    assert {"gelu_tanh", "swiglu"} <= found.keys()
    for name, result in found.items():
        assert result["calls"] == {
            "off": [calls(stock=1, searches=1)] * 2,
            "on": [calls(ours=1, searches=1)] * 2,
            "auto": [calls(ours=2, stock=1, searches=1, measured=1), calls(ours=1, searches=1)],
        }, name
        assert result["distance"] < 0.005, name


def test_each_shape_is_measured_once(layers):
    found = layers["shapes"]
    measured = calls(ours=2, stock=1, measured=1)
    for name in ("first", "other tokens", "other weight", "other dtype"):
        assert found[name] == measured, name
    for name in ("again", "not contiguous"):
        assert found[name] == calls(ours=1), name
    assert found["names"] == 3  # 3 and 4 tokens have one result in the cache file
    assert found["earlier comfy-kitchen"] == measured
    assert found["group of 1024"] == found["group of 1024, on"] == calls(stock=1)
    assert found["float64, off"] == found["float64, on"] == found["float64, auto"]


def test_models_run_in_the_mode_of_their_node_or_of_the_setting(int8_host, tmp_path):
    found = in_process(int8_host, tmp_path, "native_models")
    four_bits = ["w4a8"] if stock_loads(int8_host, "asym_w4a8_int8") else []
    for name in ("row", "tensor", "convrot", *four_bits):
        result, counted = found[name], found[name]["calls"]
        assert result["layers"] > 30
        assert counted["mode after it"] == "off"
        for case in ("on", "auto, setting on", "again"):
            assert counted[case]["ours"] >= result["layers"] and not counted[case]["stock"], (name, case)
            assert not counted[case]["measured"], (name, case)
        for case in ("auto, setting off", "off, setting on"):
            assert counted[case]["stock"] >= result["layers"] and not counted[case]["ours"], (name, case)
        assert 0 < counted["auto, setting auto"]["measured"] < result["layers"], name
        assert result["distance"] < 0.02 and result["off is stock"], (name, result)
        assert result["auto is on"], name
    for mode in ("on", "auto"):
        assert all(distance < 0.02 for distance in found[f"LoRA, {mode}"].values()), found[f"LoRA, {mode}"]
    assert found["after an exception"] == ["on", "auto"]
    assert found["setting changed during a run"] == ["off", "on"]
    assert found["parallel runs"] == ["on", "off", "off", "auto"]


def test_compiled_layers_and_models_run_in_every_mode(int8_host, tmp_path):
    found = in_process(int8_host, tmp_path, "native_compiled")
    assert len(found) == 1 + stock_loads(int8_host, "asym_w4a8_int8")
    cases = {f"{layout}, {name}": result for layout, modes in found.items() for name, result in modes.items()}
    assert len(cases) == 6 + 4 * (len(found) - 1)
    for name, result in cases.items():
        used, unused = ("stock", "ours") if name.endswith("off") else ("ours", "stock")
        # A graph of aot_eager has our operator of W4A8, which runs without the function that is counted.
        least = 0 if name.startswith("w4a8, aot_eager") else result["layers"]
        assert result["calls"][used] > least and not result["calls"][unused], (name, result)
        assert not result["calls"]["measured"], name
        assert result["layer"] < 0.005 and result["model"] < 0.02, (name, result)


def test_route_accepts_modes_only(layers):
    found = layers["route"]
    assert found == {
        '"on"': [200, "on"], '"off"': [200, "off"], '"auto"': [200, "auto"],
        "true": [400, "auto"], '"fast"': [400, "auto"], "null": [400, "auto"], '["on"]': [400, "auto"],
    }  # fmt: skip


def test_widget_accepts_modes_and_the_booleans_of_earlier_workflows(host, tmp_path):
    found = in_process(host, tmp_path, "native_widget")
    valid = {'"on"': "on", '"off"': "off", '"auto"': "auto", "true": "on", "false": "auto"}
    for value, mode in valid.items():
        assert found.pop(value) == [mode, True]
    assert found.pop("null")[1] is True  # connected: checked when the workflow runs
    for value, (message, validated) in found.items():
        assert message == validated and "choose one of auto, on, off" in message, value


@pytest.mark.browser
def test_setting_of_the_page_reaches_the_server(comfy):
    seen = []
    with open_page(comfy) as page:
        page.on("request", lambda request: seen.append(request.post_data) if ROUTE in request.url else None)
        visit(page, comfy)
        page.wait_for_load_state("networkidle")  # opening a page changes no setting
        for mode in ("on", "off", "auto"):
            with page.expect_response(lambda response: ROUTE in response.url and response.ok):
                page.evaluate(f"() => window.app.extensionManager.setting.set('LearnedRounding.NativeInt8', '{mode}')")
    assert seen == ['"on"', '"off"', '"auto"']
    assert comfy.get("/api/settings")["LearnedRounding.NativeInt8"] == "auto"


@pytest.mark.browser
@pytest.mark.parametrize(("stored", "mode"), [(True, "on"), (False, "auto")])
def test_stored_boolean_becomes_a_mode_without_a_request(comfy, stored, mode):
    comfy.post("/api/settings/LearnedRounding.NativeInt8", stored)
    seen, problems = [], []
    with open_page(comfy, problems=problems) as page:
        page.on("request", lambda request: seen.append(request.url) if ROUTE in request.url else None)
        page.wait_for_function(
            "(mode) => window.app.extensionManager.setting.get('LearnedRounding.NativeInt8') === mode", arg=mode
        )
        page.wait_for_load_state("networkidle")
    assert seen == [] and not [line for line in problems if "learned" in line.lower()]
    assert comfy.get("/api/settings")["LearnedRounding.NativeInt8"] == mode
    comfy.post("/api/settings/LearnedRounding.NativeInt8", "auto")


def test_server_refuses_a_setting_that_is_no_mode(comfy):
    for mode in MODES:
        assert comfy.post(ROUTE, mode) == mode
    comfy.post(ROUTE, "auto")
    for value in (True, "fast"):
        with pytest.raises(HostError):
            comfy.post(ROUTE, value)


@pytest.mark.parametrize("value", [*MODES, True, False])
def test_node_runs_with_each_value_where_comfyui_has_native_int8_layers(comfy, sentences, value):
    graph = ProbedGraph()
    quantized = graph.quantize(graph.load()[0], "int8_tensorwise")
    graph[quantized.id]["inputs"]["native_int8_kernels"] = value
    graph.probe(quantized[0])
    if stock_loads(comfy.host, "int8_tensorwise") or value not in ("on", True):
        comfy.queue(graph)
    else:
        with sentences.raises(HostError):
            comfy.queue(graph)


def test_node_refuses_a_value_that_is_no_mode(comfy, sentences):
    graph = ProbedGraph()
    quantized = graph.quantize(graph.load()[0], "int8_tensorwise")
    graph[quantized.id]["inputs"]["native_int8_kernels"] = "fast"
    graph.probe(quantized[0])
    with sentences.raises(HostError):
        comfy.queue(graph)
