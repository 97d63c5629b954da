"""A server's page in headless Chromium, ready to be worked with. Needs the package playwright and a Chromium.

    with open_page(server) as page:
        load_workflow(page, "example_workflows/quantize.json")
        queue_prompt(page)
        screenshot(page, "out.png")
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .server import ComfyServer, HostError

if TYPE_CHECKING:
    from playwright.sync_api import Page

__all__ = ["chromium_path", "load_workflow", "open_page", "queue_prompt", "screenshot"]

# The page of a host has no business outside this machine; these keep Chromium from trying.
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")

_READY = """() => {
    const app = window.app
    return !!(app?.graph && app?.canvas && app.vueAppReady && app.extensionManager
              && window.LiteGraph?.registered_node_types?.KSampler)
}"""

# Loading replaces the graph in several steps: it is done when the promise is, and the canvas has drawn it.
_LOAD = """async ([workflow, isGraph]) => {
    if (isGraph) await window.app.loadGraphData(workflow)
    else await window.app.loadApiJson(workflow, 'workflow')
    return window.app.graph._nodes.length
}"""

_QUEUE = """async (wait) => {
    const api = window.comfyAPI.api.api
    const ends = ['execution_success', 'execution_error', 'execution_interrupted']
    let finish
    const ended = new Promise((resolve) => { finish = (event) => resolve({type: event.type, data: event.detail}) })
    for (const end of ends) api.addEventListener(end, finish)
    try {
        const queued = await window.app.queuePrompt(0, 1)
        if (queued === false) {
            return {type: 'refused', data: {error: window.app.lastExecutionError, nodes: window.app.lastNodeErrors}}
        }
        return wait ? await ended : {type: 'queued', data: null}
    } finally {
        for (const end of ends) api.removeEventListener(end, finish)
    }
}"""

# The view glides to its place; it has arrived when it is the same for ten frames.
_FIT = """async () => {
    if (window.app.graph._nodes.length) await window.app.extensionManager.command.execute('Comfy.Canvas.FitView')
    const ds = window.app.canvas.ds
    const frame = () => new Promise(requestAnimationFrame)
    for (let last = '', same = 0; same < 10; ) {
        await frame()
        const now = [ds.scale, ...ds.offset].join()
        same = now === last ? same + 1 : 0
        last = now
    }
    window.app.canvas.draw(true, true)
    await frame()
}"""


def chromium_path() -> str | None:
    """The Chromium to use: $CHROMIUM, else the first one on the path; None if there is none."""
    return os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)


@contextlib.contextmanager
def open_page(
    server: ComfyServer,
    *,
    vue_nodes: bool = False,
    settings: Mapping[str, Any] | None = None,
    size: tuple[int, int] = (1600, 1000),
    problems: list[str] | None = None,
    timeout: float = 120,
) -> Iterator[Page]:
    """The server's page, with the application and all node types loaded.

    vue_nodes  whether nodes are drawn by Vue ("Nodes 2.0") or on the canvas
    settings   further frontend settings, such as {"Comfy.Locale": "de"}
    problems   a list that collects uncaught errors and console errors of the page
    """
    from playwright.sync_api import sync_playwright  # here, so that servers can be had without it

    chromium = chromium_path()
    if chromium is None:
        raise HostError("no Chromium: install the package chromium or set $CHROMIUM", kind="start")
    server.post(
        "/api/settings", {"Comfy.TutorialCompleted": True, "Comfy.VueNodes.Enabled": vue_nodes, **(settings or {})}
    )
    with tempfile.TemporaryDirectory(prefix="chromium-", ignore_cleanup_errors=True) as profile, sync_playwright() as pw:
        context = pw.chromium.launch_persistent_context(
            profile,
            executable_path=chromium,
            headless=True,
            args=FLAGS,
            viewport={"width": size[0], "height": size[1]},
            timeout=timeout * 1000,
        )
        try:
            context.set_default_timeout(timeout * 1000)
            page = context.pages[0] if context.pages else context.new_page()
            if problems is not None:
                page.on("pageerror", lambda error: problems.append(str(error)))
                page.on("console", lambda line: problems.append(line.text) if line.type == "error" else None)
            page.goto(server.url, wait_until="domcontentloaded")
            page.wait_for_function(_READY)
            yield page
        finally:
            context.close()


def load_workflow(page: Page, workflow: Mapping | str | Path) -> int:
    """Loads a workflow, in the page's own or in API form (a dict, or the path of a JSON file); how many nodes it has."""
    if not isinstance(workflow, Mapping):
        workflow = json.loads(Path(workflow).read_text(encoding="utf-8"))
    return page.evaluate(_LOAD, [workflow, "nodes" in workflow])


def queue_prompt(page: Page, *, wait: bool = True) -> dict:
    """Presses the run button and, unless told otherwise, waits for the end.

    The answer's "type" is execution_success, execution_error, execution_interrupted, refused or queued; "data" is
    the event's own.
    """
    return page.evaluate(_QUEUE, wait)


def screenshot(page: Page, path: Path | str, *, fit_view: bool = True) -> Path:
    """A PNG of the page, with the whole graph in view."""
    if fit_view:
        page.evaluate(_FIT)
    page.screenshot(path=path)
    return Path(path)
