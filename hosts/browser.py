"""A server's page in headless Chromium, ready to be worked with. Needs the package playwright and a Chromium.

    with open_page(server) as page:
        load_workflow(page, "example_workflows/quantize.json")
        queue_prompt(page)
        screenshot(page, "out.png")

The same calls work with every host's frontend and with either kind of nodes.
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

from .server import ComfyServer, HostError

if TYPE_CHECKING:
    from playwright.sync_api import Page

__all__ = [
    "chromium_path",
    "load_workflow",
    "open_page",
    "queue_prompt",
    "screenshot",
    "view",
    "visit",
    "wait_until_done",
]

# The page of a host has no business outside this machine; these keep Chromium from trying.
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")

# Nothing lies over the graph: no tour, no map, no frame counter, no advertisement of another kind of nodes.
SETTINGS = {
    "Comfy.TutorialCompleted": True,
    "Comfy.Minimap.Visible": False,
    "Comfy.Graph.CanvasInfo": False,
    "Comfy.RightSidePanel.IsOpen": False,  # as an earlier page may have left it
}
_NO_BANNER = """for (const key of ['vueNodesBannerDismissed', 'comfy.vueNodesMigration.dismissed'])
    try { localStorage.setItem(key, 'true') } catch { /* a page without storage has no banner */ }"""

# The page opens a workflow of its own when it starts, which would take the place of one that is loaded before.
_READY = """() => {
    const app = window.app
    return !!(app?.graph && app?.canvas && app.vueAppReady && app.extensionManager?.workflow?.activeWorkflow
              && window.LiteGraph?.registered_node_types?.KSampler)
}"""

# A workflow in API form has no positions. ComfyUI arranges its nodes, but the Vue nodes of older frontends fall back
# on each other when they are first drawn; a graph that is loaded with positions keeps them.
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

# Ends are noted from before the first workflow on, so that one that ends at once is not missed.
_NOTE_ENDS = """() => {
    if (window.endOfPrompt) return
    window.endOfPrompt = {}
    for (const type of ['execution_success', 'execution_error', 'execution_interrupted'])
        window.comfyAPI.api.api.addEventListener(type, ({detail}) => {
            window.endOfPrompt[detail.prompt_id] = {type, data: detail}
        })
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


_QUIET = """async () => {
    const {queue_running, queue_pending} = await (await fetch('/queue')).json()
    const pictures = [...window.app.graph._nodes.flatMap((node) => node.imgs ?? []), ...document.querySelectorAll('[data-node-id] img')]
    return !queue_running.length && !queue_pending.length && pictures.every((picture) => picture.complete && picture.naturalWidth)
        && !/\\b[1-9]\\d* active/.test(document.body.innerText)
}"""
# What the page shows follows its state by a frame or two.
_DRAWN = """async () => {
    window.app.canvas.setDirty(true, true)
    for (let frame = 0; frame < 4; frame++) await new Promise(requestAnimationFrame)
}"""

# The page's own bars stand at its edges: left, top, right, bottom.
_VIEW = """async ([names, zoom, alone]) => {
    const [left, top, right, bottom] = [90, 120, 30, 90]
    const {canvas, graph} = window.app
    const wanted = graph._nodes.filter((node) => names.includes(node.type) || names.includes(node.title))
    if (!wanted.length) throw new Error(`no node is called ${names}`)
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
    """The Chromium to use: $CHROMIUM, else the first one on the path; None if there is none."""
    return os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)


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
    """The server's page, with the application and all node types loaded.

    vue_nodes  whether nodes are drawn by Vue ("Nodes 2.0") or on the canvas
    settings   further frontend settings, such as {"Comfy.Locale": "de"}
    density    pixels of a picture for each of the page's
    problems   a list that collects uncaught errors of the page, and errors and warnings in its console, with where they come from
    """
    from playwright.sync_api import sync_playwright  # here, so that servers can be had without it

    chromium = chromium_path()
    if chromium is None:
        raise HostError("no Chromium: install the package chromium or set $CHROMIUM", kind="start")
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
                page.on(
                    "console",
                    lambda line: (
                        line.type in ("error", "warning") and problems.append(f"{line.text} ({line.location['url']})")
                    ),
                )
            context.add_init_script(_NO_BANNER)
            visit(page, server)
            yield page
        finally:
            context.close()


def visit(page: Page, server: ComfyServer) -> None:
    """Brings the server's page into a tab, again if it is there; returns when the application and all node types are loaded."""
    page.goto(server.url, wait_until="domcontentloaded")
    page.wait_for_function(_READY)


def load_workflow(page: Page, workflow: Mapping | str | Path) -> int:
    """Loads a workflow, in the page's own or in API form (a dict, or a JSON file); returns how many nodes it has."""
    if not isinstance(workflow, Mapping):
        workflow = json.loads(Path(workflow).read_text(encoding="utf-8"))
    return page.evaluate(_LOAD, [workflow, "nodes" in workflow])


def queue_prompt(page: Page, *, wait: bool = True) -> dict:
    """Does what the run button does and, unless told otherwise, waits for the end.

    The answer's "type" is execution_success, execution_error, execution_interrupted (with that event's "data"),
    refused (with ComfyUI's answer) or, without waiting, queued.
    """
    page.evaluate(_NOTE_ENDS)
    with page.expect_response(lambda r: r.request.method == "POST" and r.url.endswith("/prompt")) as response:
        page.evaluate("() => window.app.queuePrompt(0, 1)")
    answer = response.value.json()
    if response.value.status != 200:
        return {"type": "refused", "data": answer}
    if not wait:
        return {"type": "queued", "data": answer}
    return page.wait_for_function("(id) => window.endOfPrompt[id]", arg=answer["prompt_id"]).json_value()


def wait_until_done(page: Page) -> None:
    """Waits until nothing is queued, all pictures that nodes show are loaded, and all of it is drawn."""
    page.wait_for_function(_QUIET)
    page.evaluate(_DRAWN)


def view(page: Page, nodes: Iterable[str], *, zoom: float | None = None, alone: bool = False) -> dict[str, float]:
    """Brings all nodes of these types or titles into view, as large as they fit or at `zoom`; returns where they are on the page.

    alone  moves the other nodes away
    """
    return page.evaluate(_VIEW, [list(nodes), zoom, alone])


def screenshot(page: Page, path: Path | str, *, fit_view: bool = True) -> Path:
    """A PNG of the page, with the whole graph in view."""
    if fit_view:
        page.evaluate(_FIT)
    page.screenshot(path=path)
    return Path(path)
