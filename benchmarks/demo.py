"""``make demo``: run an example with the tiny model in ComfyUI on the CPU.

Writes an image (original | quantized | difference x8, one row per prompt) and the quantized file, and prints their paths.
"""

import argparse
import shutil
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from learned_rounding.benchmarks.tiny_model.examples import with_tiny_model
from learned_rounding.benchmarks.tiny_model.graph import pictures, psnr
from learned_rounding.benchmarks.tiny_model.place import place
from learned_rounding.hosts import ComfyServer, InstallError, find_host
from learned_rounding.hosts.workflows import to_api

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = "1 Quantize and compare"
PROMPTS = ("red apple", "owl", "rocket", "guitar", "tropical fish", "hot beverage")
_GAIN = 8
_CELL, _GAP, _HEAD = 128, 8, 40


def prepare(base: Path, output_dir: Path | None = None) -> None:
    """Copy the tiny model and the prompts into a ComfyUI base directory."""
    place(base, output_dir=output_dir, prompts=PROMPTS)


def side_by_side(full: np.ndarray, quantized: np.ndarray, title: str) -> Image.Image:
    """Draw a comparison sheet of images (prompts, height, width, 3) in 0…1."""
    columns = {"original": full, "quantized": quantized, f"difference x{_GAIN}": np.abs(full - quantized) * _GAIN}
    width = len(columns) * (_CELL + _GAP) + 190
    sheet = Image.new("RGB", (width, _HEAD + len(full) * (_CELL + _GAP)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    draw.text((_GAP, 4), title, fill="black", font=font)
    for column, (name, images) in enumerate(columns.items()):
        left = _GAP + column * (_CELL + _GAP)
        draw.text((left, 22), name, fill="dimgray", font=font)
        for row, image in enumerate(images):
            cell = Image.fromarray((image.clip(0, 1) * 255).round().astype(np.uint8)).resize(
                (_CELL, _CELL), Image.LANCZOS
            )
            sheet.paste(cell, (left, _HEAD + row * (_CELL + _GAP)))
    for row, (prompt, one, other) in enumerate(zip(PROMPTS, full, quantized, strict=True)):
        text = f"{prompt}\nPSNR {psnr(one, other):.1f} dB"
        draw.text((width - 180, _HEAD + row * (_CELL + _GAP) + _CELL // 2 - 14), text, fill="black", font=font)
    return sheet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--folder", type=Path, default=ROOT / "build" / "demo", help="ComfyUI's base directory for the demo"
    )
    parser.add_argument("--host", help="version of ComfyUI (default: the newest installed)")
    args = parser.parse_args()
    try:
        host = find_host(args.host)
    except InstallError as error:
        parser.error(str(error))
    shutil.rmtree(args.folder, ignore_errors=True)
    prepare(args.folder)
    with ComfyServer(host, base=args.folder) as server:
        print(f"ComfyUI {server.host.version} runs the example {EXAMPLE} with the tiny model on the CPU …", flush=True)
        workflow = to_api(with_tiny_model(EXAMPLE, server.object_info()), server.object_info())
        result = server.queue(workflow, on_event=_print_progress)
    texts = [entry["text"][0] for entry in result.outputs.values() if "text" in entry]
    saved = next(Path(text) for text in texts if text.endswith(".safetensors"))
    full, quantized = (pictures(args.folder / "output", name) for name in ("original", "quantized"))
    sheet = args.folder / "side_by_side.png"
    side_by_side(full, quantized, f"tiny emoji model, {saved.stem}, ComfyUI {host.version}").save(sheet)
    print(max(texts, key=len))
    print(f"image       {sheet}\nsaved file  {saved}")


def _print_progress(event) -> None:
    if event.type == "learned_rounding.progress" and event.data["state"] == "layer":
        data = event.data
        print(
            f"\r{data['index'] + 1}/{data['total']} layers",
            end="" if data["index"] + 1 < data["total"] else "\n",
            flush=True,
        )


if __name__ == "__main__":
    main()
