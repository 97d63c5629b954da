"""Pictures of the progress widget in real ComfyUI hosts: while a workflow runs, and when it is done.

    python benchmarks/screenshots.py --workflow example_workflows/quantize_file.json --out docs/images \\
        --prepare learned_rounding.benchmarks.tiny_model.place:place

Writes widget-running-HOST.png and widget-done-HOST.png for each installed host (make hosts).
"""

import argparse
import importlib
import json
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from learned_rounding.hosts import ComfyServer, Host, available_hosts
from learned_rounding.hosts.browser import load_workflow, open_page, queue_prompt, screenshot

STATE = "() => document.querySelector('.lr-progress')?.dataset.state"
# Far enough, or over already (also by an error).
REACHED = """(share) => document.querySelector('.lr-progress [role=progressbar]')?.ariaValueNow >= share
                      || Object.keys(window.endOfPrompt).length > 0"""
# What the widgets show follows the events by a frame.
SETTLED = "() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))"


def preparer(name: str) -> Callable:
    """ "package.module:function" → the function; it is called as function(base_directory, output_dir=…)."""
    module, _, function = name.partition(":")
    return getattr(importlib.import_module(module), function)


def take(
    host: Host,
    workflow: Mapping,
    out: Path,
    *,
    prepare: Callable | None = None,
    share: int = 25,
    vue_nodes: bool = False,
    size: tuple[int, int] = (1600, 1000),
    timeout: float = 600,
) -> list[Path]:
    """One run of a workflow in one host; the paths of the two pictures."""
    with tempfile.TemporaryDirectory(prefix="comfyui-") as base:
        server = ComfyServer(host, base=base)
        if prepare:
            prepare(server.base, output_dir=server.output_dir)
        with server, open_page(server, vue_nodes=vue_nodes, size=size, timeout=timeout) as page:
            kind = host.version.removesuffix(".0") + ("-vue" if vue_nodes else "")
            load_workflow(page, workflow)
            screenshot(page, out / f"widget-idle-{kind}.png").unlink()  # brings the graph into view
            answer = queue_prompt(page, wait=False)
            if answer["type"] != "queued":
                raise SystemExit(f"{host}: {json.dumps(answer['data'], indent=1)}")
            page.wait_for_function(REACHED, arg=share)
            running = screenshot(page, out / f"widget-running-{kind}.png", fit_view=False)
            if page.evaluate(STATE) != "running":
                print(f"{host}: the run was over before the picture was taken; a larger model gives more time")
            prompt = answer["data"]["prompt_id"]
            end = page.wait_for_function("(id) => window.endOfPrompt[id]", arg=prompt).json_value()
            if end["type"] != "execution_success":
                raise SystemExit(f"{host}: {json.dumps(end, indent=1)}")
            page.evaluate(SETTLED)
            return [running, screenshot(page, out / f"widget-done-{kind}.png", fit_view=False)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workflow", type=Path, required=True, help="a JSON file saved by the browser, or in API form")
    parser.add_argument("--out", type=Path, required=True, help="folder for the pictures")
    parser.add_argument("--prepare", type=preparer, metavar="MODULE:FUNCTION", help=preparer.__doc__)
    parser.add_argument("--host", help="only hosts whose version begins so; default: all")
    parser.add_argument("--share", type=int, default=25, help="percent of the layers to be done in the first picture")
    parser.add_argument("--vue-nodes", action="store_true", help="nodes drawn by Vue instead of on the canvas")
    parser.add_argument("--size", type=int, nargs=2, default=(1600, 1000), metavar=("WIDTH", "HEIGHT"))
    args = parser.parse_args()
    workflow = json.loads(args.workflow.read_text(encoding="utf-8"))
    hosts = [host for host in available_hosts() if host.version.startswith(args.host or "")]
    if not hosts:
        raise SystemExit("no such ComfyUI on this machine: make hosts")
    args.out.mkdir(parents=True, exist_ok=True)
    for host in hosts:
        pictures = take(
            host, workflow, args.out, prepare=args.prepare, share=args.share, vue_nodes=args.vue_nodes, size=args.size
        )
        for path in pictures:
            print(f"{path} ({path.stat().st_size / 1000:.0f} kB)")


if __name__ == "__main__":
    main()
