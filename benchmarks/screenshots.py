"""Screenshots of the nodes in ComfyUI, during and after a run of the examples with the tiny model.

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
# Hide the notification that a job is complete, which overlaps the nodes: in newer frontends, in older ones.
STYLE = """
    [data-testid=queue-notification-banner], div:has(> div > button.group.justify-between.rounded-lg) { opacity: 0 }
"""
SETTINGS = {"LiteGraph.Canvas.MinFontSizeForLOD": 0}  # draw text at any zoom
MARGIN = 12  # CSS pixels around the nodes
# The given percentage of layers is quantized, or the run has ended (possibly by an error).
REACHED = """(share) => [...document.querySelectorAll('.lr-progress')].some((panel) =>
        panel.querySelector('.lr-cells') && Number(panel.querySelector('[role=progressbar]')?.ariaValueNow) >= share && panel.dataset.state === 'running'
        && !panel.querySelector('.lr-strip')?.hidden)
    || Object.keys(window.endOfPrompt).length > 0"""


@dataclass(frozen=True)
class Shot:
    """Screenshot of nodes of an example.

    Attributes:
        name: file name stem.
        example: name of the example workflow.
        nodes: types or titles of the nodes to show.
        running: percentage of quantized layers at which it is taken; None for after the run.
        card: show the details of the layer at this fraction of the strip's width; None for none.
    """

    name: str
    example: str
    nodes: tuple[str, ...]
    running: int | None = None
    card: float | None = None


_RESULT = ("LearnedRoundingCalibrate", "LearnedRoundingQuantize", "LearnedRoundingSave", "Original", "Quantized")
SHOTS = (
    Shot("widget-running", "3 Calibrate and quantize", _RESULT[:3], running=25),
    Shot("widget-done", "3 Calibrate and quantize", _RESULT),
    Shot("card", "3 Calibrate and quantize", ("LearnedRoundingQuantize",), card=0.6),
    Shot("calibrate", "3 Calibrate and quantize", ("LearnedRoundingCalibrate",)),
    Shot("compare", "4 Compare in numbers", ("LearnedRoundingCompare", "How far from full precision, in numbers")),
    Shot("report", "4 Compare in numbers", ("LearnedRoundingReport",)),
    Shot("inspect", "inspect", ("LearnedRoundingInspect",)),
)


def build_inspect() -> Graph:
    """Workflow of the Inspect node."""
    graph = Graph()
    graph.add("LearnedRoundingInspect", model=f"diffusion_models/{QUANTIZED}")
    return graph


def take(page, shot: Shot, path: Path) -> Path:
    """Take one screenshot, cropped to the nodes of the shot."""
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


def wait_until_finished(page, answer: Mapping) -> None:
    """Wait for the end of a queued workflow; exit with its error if it fails."""
    if answer["type"] != "queued":
        raise SystemExit(json.dumps(answer["data"], indent=1))
    end = page.wait_for_function("(id) => window.endOfPrompt[id]", arg=answer["data"]["prompt_id"]).json_value()
    if end["type"] != "execution_success":
        raise SystemExit(json.dumps(end, indent=1))
    wait_until_done(page)


def take_all(
    host: Host, out: Path, shots: tuple[Shot, ...], *, vue_nodes: bool, theme: str, density: float
) -> Iterator[Path]:
    """Take all shots in one host; each example is run once."""
    kind = host.version.removesuffix(".0") + ("-vue" if vue_nodes else "") + ("" if theme == "dark" else f"-{theme}")
    with tempfile.TemporaryDirectory(prefix="comfyui-") as base, ComfyServer(host, base=base) as server:
        place(server.base, output_dir=server.output_dir, prompts=PROMPTS)
        place_further(server.base)
        object_info = server.object_info()
        settings = {**SETTINGS, "Comfy.ColorPalette": theme}
        with open_page(
            server, vue_nodes=vue_nodes, settings=settings, size=(1920, 1200), density=density, timeout=600
        ) as page:
            for example, some in groupby(shots, key=lambda shot: shot.example):
                load_workflow(page, build_inspect() if example == "inspect" else with_tiny_model(example, object_info))
                answer = queue_prompt(page, wait=False)
                for shot in some:
                    if shot.running is None:
                        wait_until_finished(page, answer)
                    else:
                        page.wait_for_function(REACHED, arg=shot.running)
                    yield take(page, shot, out / f"{shot.name}-{kind}.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "images", help="output folder")
    parser.add_argument(
        "--only", choices=[shot.name for shot in SHOTS], nargs="+", help="take only these; default: all"
    )
    parser.add_argument("--host", help="only hosts whose version starts with this; default: all")
    parser.add_argument("--theme", choices=("dark", "light"), default="dark")
    parser.add_argument("--vue-nodes", action="store_true", help="draw nodes with Vue instead of on the canvas")
    parser.add_argument("--density", type=float, default=1.5, help="image pixels per CSS pixel")
    args = parser.parse_args()
    hosts = [host for host in available_hosts() if host.version.startswith(args.host or "")]
    if not hosts:
        raise SystemExit("no matching ComfyUI is installed; run make hosts")
    args.out.mkdir(parents=True, exist_ok=True)
    shots = tuple(shot for shot in SHOTS if shot.name in (args.only or [shot.name]))
    for host in hosts:
        for path in take_all(host, args.out, shots, vue_nodes=args.vue_nodes, theme=args.theme, density=args.density):
            print(f"{path} ({path.stat().st_size / 1000:.0f} kB)", flush=True)


if __name__ == "__main__":
    main()
