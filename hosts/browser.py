"""Control the ComfyUI page of a server in headless Chromium. Requires the package playwright and Chromium.

    with open_page(server) as page:
        load_workflow(page, "example_workflows/quantize.json")
        queue_prompt(page)
        screenshot(page, "out.png")

The functions support the frontend of every host, with canvas nodes and with Vue nodes.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .results import HostError
from .server import ComfyServer

if TYPE_CHECKING:
    from playwright.sync_api import ConsoleMessage, Page

__all__ = [
    "chromium_path",
    "load_workflow",
    "open_page",
    "queue_prompt",
    "reopen",
    "screenshot",
    "view",
    "visit",
    "wait_until_done",
]

# Headless, and without network services of Chromium itself.
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip
EXECUTABLES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")

# Hide everything that overlaps the graph: tutorial, minimap, frame counter, the banner that advertises Vue nodes.
SETTINGS = {
    "Comfy.TutorialCompleted": True,
    "Comfy.Minimap.Visible": False,
    "Comfy.Graph.CanvasInfo": False,
    "Comfy.RightSidePanel.IsOpen": False,  # an earlier page may have opened it
    "Comfy.Locale": "en",
}
_FORGET = "forget what is stored"  # name of a window whose next page begins without drafts of the one before
_PREPARE = f"""if (window.name === '{_FORGET}') {{
    window.name = ''
    localStorage.clear()
    sessionStorage.clear()
}}
"""
_NO_BANNER = """for (const key of ['vueNodesBannerDismissed', 'comfy.vueNodesMigration.dismissed'])
    try { localStorage.setItem(key, 'true') } catch { /* without storage there is no banner */ }"""

# At startup the page opens a default workflow, which would replace one that is loaded earlier.
_READY = """() => {
    const app = window.app
    return !!(app?.graph && app?.canvas && app.vueAppReady && app.extensionManager?.workflow?.activeWorkflow
              && window.LiteGraph?.registered_node_types?.KSampler)
}"""

# A workflow in API format has no positions. ComfyUI arranges its nodes, but in older frontends Vue nodes overlap when they
# are first drawn. A graph that is loaded with positions keeps them.
_LOAD = """async ([workflow, isGraph]) => {
    const app = window.app
    if (!isGraph) {
        await app.loadApiJson(workflow, 'workflow')
        app.graph.arrange()
        workflow = app.graph.serialize()
    }
    await app.loadGraphData(workflow)
    return app.graph._nodes.length
}"""

# Registered before the first workflow, so that the end of a short one is not missed.
_RECORD_ENDS = """() => {
    if (window.endOfPrompt) return
    window.endOfPrompt = {}
    for (const type of ['execution_success', 'execution_error', 'execution_interrupted'])
        window.comfyAPI.api.api.addEventListener(type, ({detail}) => {
            window.endOfPrompt[detail.prompt_id] = {type, data: detail}
        })
}"""

# FitView is animated; it is complete when the view has not changed for 10 frames.
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


_IDLE = """async () => {
    const {queue_running, queue_pending} = await (await fetch('/queue')).json()
    const images = [...window.app.graph._nodes.flatMap((node) => node.imgs ?? []), ...document.querySelectorAll('[data-node-id] img')]
    return !queue_running.length && !queue_pending.length && images.every((image) => image.complete && image.naturalWidth)
        && !/\\b[1-9]\\d* active/.test(document.body.innerText)
}"""
# The page is drawn one or two frames after its state changes.
_DRAWN = """async () => {
    window.app.canvas.setDirty(true, true)
    for (let frame = 0; frame < 4; frame++) await new Promise(requestAnimationFrame)
}"""

# Margins in pixels keep clear of the toolbars: left, top, right, bottom.
_VIEW = """async ([names, zoom, alone]) => {
    const [left, top, right, bottom] = [90, 120, 30, 90]
    const {canvas, graph} = window.app
    const wanted = graph._nodes.filter((node) => names.includes(node.type) || names.includes(node.title))
    if (!wanted.length) throw new Error(`no node has the type or title ${names}`)
    if (alone) for (const node of graph._nodes) if (!wanted.includes(node)) node.pos = [node.pos[0] - 1e5, node.pos[1]]
    const boxes = wanted.map((node) => [node.pos[0], node.pos[1] - 30, node.pos[0] + node.size[0], node.pos[1] + node.size[1]])
    const [x0, y0] = [0, 1].map((axis) => Math.min(...boxes.map((box) => box[axis])))
    const [x1, y1] = [2, 3].map((axis) => Math.max(...boxes.map((box) => box[axis])))
    const scale = zoom ?? Math.min(1.5, (innerWidth - left - right) / (x1 - x0), (innerHeight - top - bottom) / (y1 - y0))
    const at = canvas.canvas.getBoundingClientRect()
    canvas.ds.scale = scale
    canvas.ds.offset = [(left - at.left) / scale - x0, (top - at.top) / scale - y0]
    canvas.setDirty(true, true)
    for (let frame = 0; frame < 12; frame++) await new Promise(requestAnimationFrame)
    return {x: left, y: top, width: (x1 - x0) * scale, height: (y1 - y0) * scale}
}"""


def chromium_path() -> str | None:
    """Path of Chromium: $CHROMIUM, else the first executable on PATH; None if not found."""
    return os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, EXECUTABLES)), None)


@contextlib.contextmanager
def open_page(
    server: ComfyServer,
    *,
    vue_nodes: bool = False,
    settings: Mapping[str, Any] | None = None,
    size: tuple[int, int] = (1600, 1000),
    density: float = 1,
    problems: list[str] | None = None,
    timeout: float = 120,
) -> Iterator[Page]:
    """Context manager: the server's page, with the application and all node types loaded.

    Args:
        vue_nodes: draw nodes with Vue ("Nodes 2.0") instead of on the canvas.
        settings: additional frontend settings, such as {"Comfy.Locale": "de"}.
        size: width and height of the page in CSS pixels.
        density: image pixels per CSS pixel.
        problems: list that collects uncaught errors of the page and its console errors and warnings, with their URLs.
        timeout: time limit of browser operations in s.
    """
    from playwright.sync_api import sync_playwright  # deferred: servers run without playwright

    chromium = chromium_path()
    if chromium is None:
        raise HostError("Chromium not found: install the package chromium or set $CHROMIUM", kind="start")
    server.post("/api/settings", {**SETTINGS, "Comfy.VueNodes.Enabled": vue_nodes, **(settings or {})})
    with contextlib.ExitStack() as stack:
        profile = stack.enter_context(tempfile.TemporaryDirectory(prefix="chromium-", ignore_cleanup_errors=True))
        pw = stack.enter_context(sync_playwright())
        context = pw.chromium.launch_persistent_context(
            profile,
            executable_path=chromium,
            headless=True,
            args=FLAGS,
            viewport={"width": size[0], "height": size[1]},
            device_scale_factor=density,
            timeout=timeout * 1000,
        )
        try:
            context.set_default_timeout(timeout * 1000)
            page = context.pages[0] if context.pages else context.new_page()
            if problems is not None:
                page.on("pageerror", lambda error: problems.append(f"{error} {error.stack}"))
                page.on("console", lambda line: _collect_problem(line, problems))
            context.add_init_script(_PREPARE + _NO_BANNER)
            visit(page, server)
            yield page
        finally:
            context.close()


def _collect_problem(line: ConsoleMessage, problems: list[str]) -> None:
    if line.type in ("error", "warning"):
        problems.append(f"{line.text} ({line.location['url']})")


def visit(page: Page, server: ComfyServer) -> None:
    """Load or reload the server's page in a tab; returns when the application and all node types are loaded."""
    page.goto(server.url, wait_until="domcontentloaded")
    page.wait_for_function(_READY)


def reopen(
    page: Page, server: ComfyServer, *, vue_nodes: bool = False, settings: Mapping[str, Any] | None = None
) -> None:
    """Load the server's page in an open tab as :func:`open_page` does in a new browser, which takes three times as long."""
    server.post("/api/settings", {**SETTINGS, "Comfy.VueNodes.Enabled": vue_nodes, **(settings or {})})
    page.evaluate(f"() => {{ window.name = '{_FORGET}' }}")
    visit(page, server)


def load_workflow(page: Page, workflow: Mapping | str | Path) -> int:
    """Load a workflow in the frontend's or the API format (dict or JSON file); returns its number of nodes."""
    graph = workflow if isinstance(workflow, Mapping) else json.loads(Path(workflow).read_text(encoding="utf-8"))
    return page.evaluate(_LOAD, [graph, "nodes" in graph])


def queue_prompt(page: Page, *, wait: bool = True) -> dict:
    """Queue the workflow as the run button does, and wait for its end unless ``wait`` is false.

    Returns:
        {"type": …, "data": …}. The type is execution_success, execution_error or execution_interrupted with the event's
        data; refused with ComfyUI's response; or queued if ``wait`` is false.
    """
    page.evaluate(_RECORD_ENDS)
    with page.expect_response(lambda r: r.request.method == "POST" and r.url.endswith("/prompt")) as response:
        page.evaluate("() => window.app.queuePrompt(0, 1)")
    answer = response.value.json()
    if response.value.status != 200:
        return {"type": "refused", "data": answer}
    if not wait:
        return {"type": "queued", "data": answer}
    return page.wait_for_function("(id) => window.endOfPrompt[id]", arg=answer["prompt_id"]).json_value()


def wait_until_done(page: Page) -> None:
    """Wait until the queue is empty, all images of nodes are loaded, and the page is drawn."""
    page.wait_for_function(_IDLE)
    page.evaluate(_DRAWN)


def view(page: Page, nodes: Iterable[str], *, zoom: float | None = None, alone: bool = False) -> dict[str, float]:
    """Show all nodes of the given types or titles, scaled to fit or at ``zoom``.

    Args:
        alone: move all other nodes out of view.

    Returns:
        Bounding box on the page in CSS pixels: x, y, width, height.
    """
    return page.evaluate(_VIEW, [list(nodes), zoom, alone])


def screenshot(page: Page, path: Path | str, *, fit_view: bool = True) -> Path:
    """Save a PNG of the page; with ``fit_view`` the whole graph is in view."""
    if fit_view:
        page.evaluate(_FIT)
    page.screenshot(path=path)
    return Path(path)
