"""The setting for INT8 kernels in a page: sent to the server, and values of version 0.1.0 converted."""

import pytest

from learned_rounding.hosts.browser import visit

pytestmark = pytest.mark.browser

ROUTE = "/learned_rounding/native_int8"
SETTING = "LearnedRounding.NativeInt8"


@pytest.fixture
def requests(comfy_page):
    """Bodies of the requests to the route of the setting."""
    seen = []

    def record(request):
        if ROUTE in request.url:
            seen.append(request.post_data)

    comfy_page.on("request", record)
    yield seen
    comfy_page.remove_listener("request", record)


def test_setting_of_the_page_reaches_the_server(comfy, comfy_page, requests):
    visit(comfy_page, comfy)
    comfy_page.wait_for_load_state("networkidle")  # opening a page changes no setting
    for mode in ("on", "off", "auto"):
        with comfy_page.expect_response(lambda response: ROUTE in response.url and response.ok):
            comfy_page.evaluate(f"() => window.app.extensionManager.setting.set('{SETTING}', '{mode}')")
    assert requests == ['"on"', '"off"', '"auto"']
    assert comfy.get("/api/settings")[SETTING] == "auto"


@pytest.mark.parametrize(("stored", "mode"), [(True, "on"), (False, "auto")])
def test_stored_boolean_becomes_a_mode_without_a_request(comfy, comfy_page, requests, stored, mode):
    comfy.post(f"/api/settings/{SETTING}", stored)
    visit(comfy_page, comfy)
    comfy_page.wait_for_function(f"(mode) => window.app.extensionManager.setting.get('{SETTING}') === mode", arg=mode)
    comfy_page.wait_for_load_state("networkidle")
    assert requests == []
    assert [line for line in comfy_page.problems if "learned" in line.lower()] == []
    assert comfy.get("/api/settings")[SETTING] == mode
    comfy.post(f"/api/settings/{SETTING}", "auto")
