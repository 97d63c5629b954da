"""``make demo``: quantize the tiny model to W4A8 in ComfyUI on the CPU, by three roundings, and sample with each.

Writes an image (round to nearest (RTN) | calibrated | sequential | full precision, one row per prompt) and the quantized file, and prints
their paths. The prompts of the images are not among those of the calibration.
"""

import argparse
import contextlib
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from learned_rounding.benchmarks.tiny_formats import FORMATS, calibration_prompts
from learned_rounding.benchmarks.tiny_model.graph import MODEL, TinyGraph, pictures, psnr
from learned_rounding.benchmarks.tiny_model.place import place
from learned_rounding.hosts import ComfyServer, InstallError, find_host
from learned_rounding.hosts.results import Event
from learned_rounding.hosts.ticker import Ticker
from learned_rounding.quant_core.display import human_bytes

__all__ = ["draw_sheet", "main"]

ROOT = Path(__file__).resolve().parent.parent
FORMAT = FORMATS["W4A8, all layers"]  # the preset keeps half of the tiny model in INT8
ROUNDINGS = {"W4A8, RTN": "nearest", "W4A8, calibrated": "calibrated", "W4A8, sequential": "sequential"}
FULL = "full precision"
PROMPTS = ("red apple", "owl", "rocket", "guitar", "tropical fish", "hot beverage")
CALIBRATION, CALIBRATION_PROMPTS, BATCH, CALLS = "calibration", 48, 16, 16
_CELL, _GAP, _HEAD, _FOOT, _NAMES = 192, 8, 56, 22, 130


def _build_graph() -> tuple[TinyGraph, str]:
    """The workflow, and the id of Save Quantized of the last rounding."""
    graph = TinyGraph()
    model = graph.load()
    graph.sample_together(model[0], FULL, len(PROMPTS))
    calibration = graph.calibrate(model[0], seed=1001, dataset=CALIBRATION, batch=BATCH, replay_calls=CALLS)
    saved = None
    for name, rounding in ROUNDINGS.items():
        known = None if rounding == "nearest" else calibration[0]
        quantized = graph.quantize(model[0], **FORMAT, rounding=rounding, calibration=known)
        graph.sample_together(quantized[0], name, len(PROMPTS))
        saved = graph.save(quantized, "demo")
    assert saved is not None
    return graph, saved.id


def _describe_event(event: Event, graph: Mapping[str, dict]) -> str | None:
    """What an event says about the progress, in one line; None for events without progress."""
    if not isinstance(event.data, dict):
        return None
    data = event.data
    node = graph.get(str(data.get("node")), {})
    title = f"{node.get('class_type')} {node.get('inputs', {}).get('filename_prefix', '')}".strip()
    if event.type == "executing" and node:
        return title
    if event.type == "progress" and node:
        return f"{title}: {data['value']} of {data['max']}"
    if event.type == "learned_rounding.progress" and data["state"] == "layer":
        return f"rounding {data['solver']}: layer {data['index'] + 1} of {data['total']}"
    if event.type == "learned_rounding.progress" and data["state"] == "block":
        return f"sequential rounding: block {data['index'] + 1} of {data['total']}"
    return None


def draw_sheet(columns: Mapping[str, np.ndarray], title: str) -> Image.Image:
    """Draw columns of images (prompts, height, width, 3) in 0…1 with their PSNR to the last column."""
    *_, full = columns.values()
    width = _NAMES + len(columns) * (_CELL + _GAP) + _GAP
    sheet = Image.new("RGB", (width, _HEAD + len(full) * (_CELL + _FOOT + _GAP)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(15)
    draw.text((_GAP, 6), title, fill="black", font=font)
    for column, (name, images) in enumerate(columns.items()):
        left = _NAMES + column * (_CELL + _GAP)
        mean = np.mean([psnr(*pair) for pair in zip(full, images, strict=True)])
        draw.text((left, 32), name if images is full else f"{name}  {mean:.1f} dB", fill="black", font=font)
        for row, image in enumerate(images):
            top = _HEAD + row * (_CELL + _FOOT + _GAP)
            cell = Image.fromarray((image.clip(0, 1) * 255).round().astype(np.uint8))
            sheet.paste(cell.resize((_CELL, _CELL), Image.Resampling.LANCZOS), (left, top))
            if images is not full:
                draw.text((left, top + _CELL + 2), f"PSNR {psnr(full[row], image):.1f} dB", fill="dimgray", font=font)
    for row, prompt in enumerate(PROMPTS[: len(full)]):
        middle = _HEAD + row * (_CELL + _FOOT + _GAP) + _CELL // 2
        draw.text((_GAP, middle), prompt, fill="black", font=font, anchor="lm")
    return sheet


@contextlib.contextmanager
def _start_server(folder: Path, version: str | None, ticker: Ticker) -> Iterator[ComfyServer]:
    """A server whose base folder has the tiny model, its prompts and those of the calibration."""
    shutil.rmtree(folder, ignore_errors=True)
    place(folder, prompts=PROMPTS, batch=len(PROMPTS))
    others = calibration_prompts(list(PROMPTS), CALIBRATION_PROMPTS)
    place(folder, prompts=others, dataset=CALIBRATION, batch=BATCH)
    host = find_host(version)
    ticker.tell(f"starting ComfyUI {host.version} on the CPU")
    with ComfyServer(host, base=folder) as server:
        yield server


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--folder", type=Path, default=ROOT / "build" / "demo", help="ComfyUI's base directory for the demo"
    )
    parser.add_argument("--host", help="version of ComfyUI (default: the newest installed)")
    args = parser.parse_args()
    graph, saved_id = _build_graph()
    try:
        with Ticker() as ticker, _start_server(args.folder, args.host, ticker) as server:
            result = server.queue(
                graph, timeout=3600, on_event=lambda event: ticker.tell(_describe_event(event, graph))
            )
            version = server.host.version
    except InstallError as error:
        parser.error(str(error))
    saved = Path(result.outputs[saved_id]["text"][0])
    columns = {name: pictures(args.folder / "output", name) for name in (*ROUNDINGS, FULL)}
    before, after = ((args.folder / "models" / "diffusion_models" / MODEL).stat().st_size, saved.stat().st_size)
    title = f"tiny emoji model, {human_bytes(before)} to {human_bytes(after)}, ComfyUI {version} on a CPU"
    sheet = args.folder / "side_by_side.png"
    draw_sheet(columns, title).save(sheet)
    full = columns.pop(FULL)
    for name, images in columns.items():
        print(f"{name:<24} PSNR {np.mean([psnr(*pair) for pair in zip(full, images, strict=True)]):.1f} dB")
    print("Six images of one seed are too few to compare roundings; docs/results.md has the measurements.")
    print(f"image       {sheet}\nsaved file  {saved}")


if __name__ == "__main__":
    main()
