"""Benchmark of the progress panel: ms per message and per frame, from Chromium's trace.

    python benchmarks/widget.py --json benchmarks/results/widget_cpu.json

For every installed ComfyUI (make hosts), with canvas nodes and with Vue nodes, the page receives the progress messages of
a run of many layers: at the pace of a GPU, all at once, and as one response, as after a reload of the page.
"message": the panel's event listener, or the whole response. "frame": its animation frame callback. "rendering": style,
layout and paint of the whole page in these frames, including ComfyUI's. Times are CPU times of the page's main thread, so
that other processes are excluded.
"""

import functools
import json
import statistics
from collections.abc import Iterable, Iterator

from learned_rounding.benchmarks.harness import arguments, finish
from learned_rounding.hosts import ComfyServer, available_hosts
from learned_rounding.hosts.browser import load_workflow, open_page

LAYERS = 2000
PACES = {"one every 10 ms": 10, "all at once": 0, "in one answer": None}
MARK = "learned_rounding.message"
RENDERING = {"UpdateLayoutTree", "Layout", "PrePaint", "Paint", "Layerize", "Commit"}
CATEGORIES = "devtools.timeline,blink.user_timing"

# One node, fully visible: Vue does not draw nodes outside the view.
WORKFLOW = {
    "nodes": [{"id": 1, "type": "LearnedRoundingQuantize", "pos": [200, 200], "size": [400, 440], "flags": {}, "order": 0, "mode": 0}],
    "links": [], "groups": [], "config": {}, "extra": {"ds": {"scale": 1, "offset": [0, 0]}}, "version": 0.4,
    "last_node_id": 1, "last_link_id": 0,
}  # fmt: skip

_TWO_FRAMES = """
    const frame = () => new Promise(requestAnimationFrame)
    await frame()
    await frame()
}"""
# Each message in a separate task, as from the websocket; with a pace of 0 there is no pause between them.
_PLAY = (
    """async ([messages, pace, mark]) => {
    const {api} = window.comfyAPI.api
    const {port1, port2} = new MessageChannel()
    const next = () => new Promise((done) => {
        if (pace) return setTimeout(done, pace)
        port1.onmessage = done
        port2.postMessage(null)
    })
    for (const text of messages) {
        const event = new CustomEvent('learned_rounding.progress', {detail: {...JSON.parse(text), workflow: window.app.rootGraph.id}})
        performance.mark(`${mark}.begin`)
        api.dispatchEvent(event)
        performance.mark(`${mark}.end`)
        await next()
    }"""
    + _TWO_FRAMES
)
# All messages at once, as after a reload of the page.
_REPLAY = (
    """async ([messages, _, mark]) => {
    const {showRun} = await import('/extensions/learned_rounding/progress_widget.js')
    const run = messages.map((text) => JSON.parse(text))
    performance.mark(`${mark}.begin`)
    showRun(window.app.graph._nodes[0], run)
    performance.mark(`${mark}.end`)"""
    + _TWO_FRAMES
)


def messages(node: str, layers: int) -> Iterator[dict]:
    """Progress messages of a run with two formats, in which every tenth layer is skipped."""
    names = [f"double_blocks.{index}.img_attn.qkv.weight" for index in range(layers)]
    plan = [[name, [3072, 3072], int(index % 10 == 0)] for index, name in enumerate(names)]
    quantized = [name for name, _, skipped in plan if not skipped]
    common = {"node": node, "prompt": "benchmark"}
    start = {
        "state": "start", "source": "model.safetensors", "format": "measured", "granularity": "", "rounding": "calibrated",
        "preset": "flux", "total": len(quantized), "kept": layers - len(quantized), "bytes_in": layers * 18_874_368,
        "plan": plan, "reasons": ["", "first layer"],
    }  # fmt: skip
    yield {**common, "seq": 0, **start}
    for index, name in enumerate(quantized):
        error = 0.01 + (index * 7919 % 1000) / 50_000
        yield {
            **common, "seq": index + 1, "state": "layer", "index": index, "total": len(quantized), "name": name,
            "shape": [3072, 3072], "format": ("int8_tensorwise", "float8_e4m3fn")[index % 3 == 0], "granularity": "row",
            "convrot": None, "error": error, "output_error": error / 2, "solver": "gptq",
            "gain": 0.4 + (index % 60) / 100, "scale": [0.001, 0.002], "seconds": 0.05, "bytes_in": 18_874_368,
            "bytes_out": 9_449_472, "elapsed": 0.05 * (index + 1), "eta": 0.05 * (len(quantized) - index - 1),
        }  # fmt: skip


def record_trace(page, work) -> list[dict]:
    """Events of Chromium's trace while ``work()`` runs."""
    session, events, ended = page.context.new_cdp_session(page), [], []
    session.on("Tracing.dataCollected", lambda part: events.extend(part["value"]))
    session.on("Tracing.tracingComplete", lambda _: ended.append(True))
    session.send("Tracing.start", {"categories": CATEGORIES, "transferMode": "ReportEvents"})
    try:
        work()
    finally:
        session.send("Tracing.end")
        while not ended:
            page.wait_for_timeout(20)
        session.detach()
    return events


def milliseconds(events: Iterable[dict]) -> dict[str, list[float]]:
    """Durations in ms of each "message", "frame" and "rendering" of the panel."""
    begins, ends = (
        sorted(event["tts"] for event in events if event["name"] == f"{MARK}.{part}") for part in ("begin", "end")
    )
    frames = sorted(
        (event["tts"], event["tts"] + event["tdur"])
        for event in events
        if event["name"] == "FunctionCall"
        and event["ph"] == "X"
        and "progress_widget.js" in event["args"]["data"].get("url", "")
    )
    thread = {event["tid"] for event in events if event["name"] == f"{MARK}.begin"}
    rendering = sorted(
        (event["tts"], event["tdur"])
        for event in events
        if event["name"] in RENDERING and event["ph"] == "X" and event["tid"] in thread
    )
    following = [begin for begin, _ in frames[1:]] + [float("inf")]
    drawn = [
        sum(duration for at, duration in rendering if end <= at < following)
        for (_, end), following in zip(frames, following, strict=True)
    ]
    found = {
        "message": [end - begin for begin, end in zip(begins, ends, strict=True)],
        "frame": [end - begin for begin, end in frames],
        "rendering": drawn,
    }
    return {name: [duration / 1000 for duration in durations] for name, durations in found.items()}


def summarize(what: str, durations: list[float]) -> dict:
    """Count, median, 95th percentile and maximum of durations in ms."""
    cuts = statistics.quantiles(durations, n=20, method="inclusive") if len(durations) > 1 else durations * 20
    return {
        "what": what,
        "count": len(durations),
        "p50 ms": statistics.median(durations),
        "p95 ms": cuts[18],
        "max ms": max(durations),
    }


def main() -> None:
    args = arguments(
        __doc__.splitlines()[0],
        ("--layers", {"type": int, "help": f"number of layers (default: {LAYERS}, quick: 200)"}),
    )
    layers = args.layers or (200 if args.quick else LAYERS)
    hosts = available_hosts()
    if not hosts:
        raise SystemExit("no ComfyUI is installed; run make hosts")
    rows = []
    for host in hosts:
        with ComfyServer(host) as server:
            for vue_nodes in (False, True):
                with open_page(server, vue_nodes=vue_nodes) as page:
                    for pace, delay in PACES.items():
                        load_workflow(page, WORKFLOW)
                        page.locator(".lr-progress").wait_for(state="visible")
                        texts = [json.dumps(message) for message in messages("1", layers)]
                        play = functools.partial(
                            page.evaluate, _REPLAY if delay is None else _PLAY, [texts, delay, MARK]
                        )
                        measured = milliseconds(record_trace(page, play))
                        shown = page.locator(".lr-count").inner_text()
                        if not shown.startswith("100 %"):
                            raise SystemExit(f"{host}: the panel shows '{shown}' after the last layer instead of 100 %")
                        common = {"host": host.version, "nodes": "Vue" if vue_nodes else "canvas", "layers": pace}
                        rows += [{**common, **summarize(what, durations)} for what, durations in measured.items()]
    finish(args, rows, layers=layers)


if __name__ == "__main__":
    main()
