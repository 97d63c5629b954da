"""The setting and the widget that choose the kernels of ComfyUI's native INT8 layers: off, on or auto."""

import asyncio
import contextlib
import io
import json
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import pytest

from learned_rounding.hosts import HostError
from learned_rounding.quant_core.errors import QuantizationError
from learned_rounding.tests.in_comfyui import IN_COMFYUI
from learned_rounding.tests.nodes.probing import stock_loads

if IN_COMFYUI:
    import folder_paths

    from learned_rounding.nodes import host as pack
    from learned_rounding.nodes.host import native_int8, native_layers, running
    from learned_rounding.nodes.quantize import LearnedRoundQuantize
    from learned_rounding.tests.nodes.host.cpu_in_place_of_gpu import on_cpu, set_mode
    from learned_rounding.tests.nodes.host.tiny_model import TinyModel

ROUTE = "/learned_rounding/native_int8"
MODES = ["auto", "on", "off"]


@pytest.fixture
def in_comfyui_with_int8(in_comfyui, host):
    if not stock_loads(host, "int8_tensorwise"):
        pytest.skip(f"ComfyUI {host.version} has no INT8 layers of its own")


@pytest.fixture
def on_cpu_with_int8(in_comfyui_with_int8):
    with on_cpu():
        yield


def state() -> tuple[str, bool]:
    """The mode, and whether comfy-kitchen has our backend."""
    from comfy_kitchen.registry import registry

    return native_layers._mode, registry.is_available("learned_rounding")


@pytest.fixture
def settings():
    """The file of ComfyUI's settings."""
    path = Path(folder_paths.get_user_directory()) / "default" / "comfy.settings.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


# Content of the file of settings → mode.
STORED = {
    '{"SETTING": "on"}': "on",
    '{"SETTING": "off"}': "off",
    '{"SETTING": "auto"}': "auto",
    '{"SETTING": true}': "on",
    '{"SETTING": false}': "auto",
    '{"SETTING": "fast"}': "auto",
    '{"SETTING": 3}': "auto",
    "damaged": "auto",
    "{}": "auto",
    "[]": "auto",
}


def test_stored_setting_decides_where_our_kernels_can_run(on_cpu_with_int8, settings, subtests):
    with patch.object(running, "PromptServer", SimpleNamespace()):
        for content, mode in STORED.items():
            settings.write_text(content.replace("SETTING", native_int8.SETTING))
            pack.add_native_int8_setting()
            with subtests.test(content):
                assert state() == (mode, mode != "off")


def test_stored_setting_is_ignored_without_a_gpu(in_comfyui_with_int8, settings):
    settings.write_text(json.dumps({native_int8.SETTING: "on"}))
    with (
        patch.object(running, "PromptServer", SimpleNamespace()),
        patch.object(native_int8, "_can_run", lambda: False),
    ):
        pack.add_native_int8_setting()
    assert state() == ("off", False)


def test_registry_offers_our_backend_only_what_it_supports(in_comfyui_with_int8):
    from comfy_kitchen.registry import registry

    native_layers.kitchen_registry()
    needs = registry.get_constraints("learned_rounding", "int8_linear")
    assert set(needs.default_devices) == {"cuda"}
    assert tuple(needs.min_compute_capability) == (8, 0)
    assert set(needs.params) == {"x"}
    order = [name for name in registry._priority if name in ("learned_rounding", "eager")]
    assert order == ["learned_rounding", "eager"]


def test_mode_is_restored_after_an_exception(on_cpu_with_int8):
    tiny = TinyModel()
    model = pack.build_model(tiny.original, tiny.file(format="int8_tensorwise"), "on")
    (wrapper,) = model.wrappers["apply_model"]["learned_rounding"]
    set_mode("auto")
    during = []

    def execute():
        during.append(native_layers._mode)
        raise RuntimeError

    with contextlib.suppress(RuntimeError):
        wrapper(execute)
    assert during == ["on"]
    assert native_layers._mode == "auto"


def test_setting_that_changes_during_a_run_applies_after_it(on_cpu_with_int8):
    native_int8._set_setting("auto")
    with native_int8._running_in("off"):
        native_int8._set_setting("on")
        assert native_layers._mode == "off"
    assert native_layers._mode == "on"


def test_of_two_parallel_runs_the_later_one_decides(on_cpu_with_int8):
    native_int8._set_setting("auto")
    first, second = native_int8._running_in("on"), native_int8._running_in("off")
    modes = []
    for step in (
        first.__enter__,
        second.__enter__,
        *(lambda run=run: run.__exit__(None, None, None) for run in (first, second)),
    ):
        step()
        modes.append(native_layers._mode)
    assert modes == ["on", "off", "off", "auto"]


def test_route_accepts_modes_only(on_cpu_with_int8, subtests):
    handlers = []

    class Routes:
        def post(self, path):
            return handlers.append

    async def change(value):
        body = io.BytesIO(json.dumps(value).encode())

        async def read(size):
            return body.read(size)

        return await handlers[0](SimpleNamespace(content_type="application/json", content=SimpleNamespace(read=read)))

    with patch.object(running, "PromptServer", SimpleNamespace(instance=SimpleNamespace(routes=Routes()))):
        pack.add_native_int8_setting()
    for mode in ("on", "off", "auto"):
        with subtests.test(mode):
            assert asyncio.run(change(mode)).status == 200
            assert native_layers._mode == mode
    for value in (True, "fast", None, ["on"]):
        with subtests.test(str(value)):
            assert asyncio.run(change(value)).status == 400
            assert native_layers._mode == "auto"


def test_server_refuses_a_setting_that_is_no_mode(comfy):
    for mode in MODES:
        assert comfy.post(ROUTE, mode) == mode
    comfy.post(ROUTE, "auto")
    for value in (True, "fast"):
        with pytest.raises(HostError):
            comfy.post(ROUTE, value)


def test_widget_accepts_modes_and_the_booleans_of_earlier_workflows(in_comfyui, subtests):
    for value, mode in {"on": "on", "off": "off", "auto": "auto", True: "on", False: "auto"}.items():
        with subtests.test(str(value)):
            assert pack.native_int8_mode(value) == mode
            assert LearnedRoundQuantize.validate_inputs(value) is True


def test_connected_widget_is_checked_when_the_workflow_runs(in_comfyui):
    assert LearnedRoundQuantize.validate_inputs(None) is True
    with pytest.raises(QuantizationError):
        pack.native_int8_mode(None)


@pytest.mark.parametrize("value", ["fast", 1, ["on"]], ids=str)
def test_widget_refuses_other_values(in_comfyui, value):
    with pytest.raises(QuantizationError, match="choose one of auto, on, off") as error:
        pack.native_int8_mode(value)
    assert LearnedRoundQuantize.validate_inputs(value) == str(error.value)
