"""Pictures of the nodes in real ComfyUI hosts, at work and after it: examples run with the tiny model.

python benchmarks/screenshots.py                     writes docs/images/NAME-HOST.png for each host
python benchmarks/screenshots.py --vue-nodes         NAME-HOST-vue.png
python benchmarks/screenshots.py --theme light       NAME-HOST-light.png
"""

import argparse
import json
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from learned_rounding.benchmarks.tiny_model.examples import QUANTIZED, place_further, with_tiny_model
from learned_rounding.benchmarks.tiny_model.place import place
from learned_rounding.hosts import ComfyServer, Host, available_hosts
from learned_rounding.hosts.browser import load_workflow, open_page, queue_prompt, view, wait_until_done
from learned_rounding.hosts.workflows import Graph

ROOT = Path(__file__).resolve().parents[1]
PROMPTS = ("red apple", "owl", "rocket", "guitar")
# The page's own word that a job is done lies over the nodes for some seconds, from some moment on: of newer frontends, of older ones. Opacity takes no time.
STYLE = """
    [data-testid=queue-notification-banner], div:has(> div > button.group.justify-between.rounded-lg) { opacity: 0 }
"""
SETTINGS = {"LiteGraph.Canvas.MinFontSizeForLOD": 0}  # words are words at any zoom
MARGIN = 12  # pixels of the page around the nodes
# So many percent of the layers are quantized, or it is over already (also by an error).
REACHED = """(share) => [...document.querySelectorAll('.lr-progress')].some((panel) =>
        panel.querySelector('.lr-cells') && Number(panel.querySelector('[role=progressbar]')?.ariaValueNow) >= share && panel.dataset.state === 'running'
        && !panel.querySelector('.lr-strip')?.hidden)
    || Object.keys(window.endOfPrompt).length > 0"""


@dataclass(frozen=True)
class Shot:
    """A picture: of which example, of which nodes of it (types or titles), and when."""

    name: str
    example: str
    nodes: tuple[str, ...]
    running: int | None = None  # percent of the layers that are done; None: after the run
    card: float | None = None  # show the card of the layer at this part of the strip's width


_RESULT = ("LearnedRoundingCalibrate", "LearnedRoundingQuantize", "LearnedRoundingSave", "Original", "Quantized")
SHOTS = (
    Shot("widget-running", "calibrate_then_sample", _RESULT[:3], running=25),
    Shot("widget-done", "calibrate_then_sample", _RESULT),
    Shot("card", "calibrate_then_sample", ("LearnedRoundingQuantize",), card=0.6),
    Shot("calibrate", "calibrate_then_sample", ("LearnedRoundingCalibrate",)),
    Shot("compare", "calibrate_and_compare", ("LearnedRoundingCompare", "How far from full precision, in numbers")),
    Shot("report", "calibrate_and_compare", ("LearnedRoundingReport",)),
    Shot("inspect", "inspect", ("LearnedRoundingInspect",)),
)


def inspect() -> Graph:
    graph = Graph()
    graph.add("LearnedRoundingInspect", model=f"diffusion_models/{QUANTIZED}")
    return graph


def take(page, shot: Shot, path: Path) -> Path:
    """One picture of what the page shows, no larger than the nodes of the shot."""
    at = view(page, shot.nodes)
    if shot.card is not None:
        strip = page.locator(".lr-strip:visible").last.bounding_box()
        page.mouse.move(strip["x"] + shot.card * strip["width"], strip["y"] + strip["height"] / 2)
        page.locator(".lr-card:visible").wait_for()
        at["height"] = max(
            at["height"], sum(page.locator(".lr-card:visible").bounding_box()[key] for key in ("y", "height")) - at["y"]
        )
    clip = {
        "x": at["x"] - MARGIN,
        "y": at["y"] - MARGIN,
        "width": at["width"] + 2 * MARGIN,
        "height": at["height"] + 2 * MARGIN,
    }
    page.screenshot(path=path, clip=clip, style=STYLE)
    page.mouse.move(0, 0)
    return path


def finished(page, answer: Mapping) -> None:
    """Waits for the end of a queued workflow; ends the script if it is a bad one."""
    if answer["type"] != "queued":
        raise SystemExit(json.dumps(answer["data"], indent=1))
    end = page.wait_for_function("(id) => window.endOfPrompt[id]", arg=answer["data"]["prompt_id"]).json_value()
    if end["type"] != "execution_success":
        raise SystemExit(json.dumps(end, indent=1))
    wait_until_done(page)


def take_all(
    host: Host, out: Path, shots: tuple[Shot, ...], *, vue_nodes: bool, theme: str, density: float
) -> Iterator[Path]:
    """All shots in one host, each example run once."""
    kind = host.version.removesuffix(".0") + ("-vue" if vue_nodes else "") + ("" if theme == "dark" else f"-{theme}")
    with tempfile.TemporaryDirectory(prefix="comfyui-") as base, ComfyServer(host, base=base) as server:
        place(server.base, output_dir=server.output_dir, prompts=PROMPTS)
        place_further(server.base)
        known = server.object_info()
        settings = {**SETTINGS, "Comfy.ColorPalette": theme}
        with open_page(
            server, vue_nodes=vue_nodes, settings=settings, size=(1920, 1200), density=density, timeout=600
        ) as page:
            for example, some in groupby(shots, key=lambda shot: shot.example):
                load_workflow(page, inspect() if example == "inspect" else with_tiny_model(example, known))
                answer = queue_prompt(page, wait=False)
                for shot in some:
                    if shot.running is None:
                        finished(page, answer)
                    else:
                        page.wait_for_function(REACHED, arg=shot.running)
                    yield take(page, shot, out / f"{shot.name}-{kind}.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "images", help="folder for the pictures")
    parser.add_argument("--only", choices=[shot.name for shot in SHOTS], nargs="+", help="these pictures; default: all")
    parser.add_argument("--host", help="only hosts whose version begins so; default: all")
    parser.add_argument("--theme", choices=("dark", "light"), default="dark")
    parser.add_argument("--vue-nodes", action="store_true", help="nodes drawn by Vue instead of on the canvas")
    parser.add_argument("--density", type=float, default=1.5, help="pixels of a picture for each of the page's")
    args = parser.parse_args()
    hosts = [host for host in available_hosts() if host.version.startswith(args.host or "")]
    if not hosts:
        raise SystemExit("no such ComfyUI on this machine: make hosts")
    args.out.mkdir(parents=True, exist_ok=True)
    shots = tuple(shot for shot in SHOTS if shot.name in (args.only or [shot.name]))
    for host in hosts:
        for path in take_all(host, args.out, shots, vue_nodes=args.vue_nodes, theme=args.theme, density=args.density):
            print(f"{path} ({path.stat().st_size / 1000:.0f} kB)", flush=True)


if __name__ == "__main__":
    main()
