"""Thumbnails of the examples for the template browser: before | after, with the sizes of the files.

Images and sizes are those of a run with the tiny model. Some examples show the planned size of the
model that they name, whose tensors tests/architectures lists.

python benchmarks/thumbnails.py      writes example_workflows/NAME.jpg, with the newest installed host
"""

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from learned_rounding.benchmarks.tiny_model.examples import EXAMPLES, place_further, with_tiny_model
from learned_rounding.benchmarks.tiny_model.place import place
from learned_rounding.hosts import ComfyServer, Host, find_host
from learned_rounding.hosts.workflows import to_api
from learned_rounding.quant_core import Recipe
from learned_rounding.quant_core.output import inspect_file
from learned_rounding.quant_core.run.estimate import estimate_size
from learned_rounding.tests.architectures.table import source

PROMPTS = ("red apple", "owl", "rocket", "guitar")
SIZE = (960, 540)
TIMEOUT = 3600  # s
# Example → title and list of the model, and format.
PLANNED = {
    "2 Quantize a model file": ("Z-Image", "zimage", "int8"),
    "6 W4A8 with sequential rounding": ("Z-Image", "zimage", "w4a8"),
    "9 Quantize a text encoder": ("T5-XXL", "t5", "fp8"),
}
LOADERS = ("UNETLoader", "LearnedRoundingLoadModel")
BACKGROUND, TEXT, MUTED, BEFORE, AFTER = "#1b1d22", "#f4f4f5", "#a1a1aa", "#94a3b8", "#22c55e"
HEAD, FOOT, MARGIN = 100, 76, 28  # heights above and below the images, and space between, in pixels


@dataclass(frozen=True)
class Result:
    """What one run of an example wrote.

    Attributes:
        before: size of the source in bytes.
        after: size of the quantized file in bytes.
        format: most frequent format of its layers, after the model's name if it is planned.
        originals: images sampled with the source, in the order of the prompts; none if the example does not sample.
        quantized: images sampled with the quantized model.
        chart: the image that Compare saved, if the example has one.
    """

    before: int
    after: int
    format: str
    originals: Sequence[Image.Image] = ()
    quantized: Sequence[Image.Image] = ()
    chart: Image.Image | None = None


def plan_result(title: str, model: str, format: str) -> Result:
    """Sizes of a model's true tensors, before and in a format."""
    header, recipe = source(model), Recipe(format=format)
    before = sum(info.nbytes for info in header.tensors.values())
    return Result(before, estimate_size(header, recipe, recipe.plan(header)), f"{title}, {format}")


def run_example(host: Host, name: str) -> Result:
    """Run an example with the tiny model in a server of its own."""
    with tempfile.TemporaryDirectory(prefix="comfyui-") as base, ComfyServer(host, base=base) as server:
        place(server.base, output_dir=server.output_dir, prompts=PROMPTS)
        place_further(server.base)
        workflow = with_tiny_model(name, server.object_info())
        result = server.queue(to_api(workflow, server.object_info()), timeout=TIMEOUT)
        texts = [entry["text"][0] for entry in result.outputs.values() if "text" in entry]
        saved = next(Path(text) for text in texts if text.endswith(".safetensors"))
        loader = next(node for node in workflow["nodes"] if node["type"] in LOADERS)
        (original,) = server.models_dir.glob(f"*/{loader['widgets_values'][0].rpartition('/')[2]}")
        originals, quantized, charts = (
            [Image.open(path).convert("RGB") for path in sorted(server.output_dir.glob(f"{prefix}_*.png"))]
            for prefix in ("original", "quantized", "comparison")
        )
        formats = inspect_file(saved).quantized
        return Result(
            original.stat().st_size,
            saved.stat().st_size,
            max(formats, key=formats.get),
            originals,
            quantized,
            charts[0] if charts else None,
        )


def human_size(size: int) -> str:
    """Three significant digits of MB or GB."""
    return f"{size / 1e9:.3g} GB" if size >= 1e9 else f"{size / 1e6:.3g} MB"


def draw_thumbnail(result: Result) -> Image.Image:
    """Draw both sides with their sizes, and the saving; letters are large because pages show a quarter of the size."""
    width, height = SIZE
    sheet = Image.new("RGB", SIZE, BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    saving = f"{1 - result.after / result.before:.0%} smaller".replace("%", " %")
    draw.text((MARGIN, height - FOOT), saving, TEXT, ImageFont.load_default(52))
    draw.text((width - MARGIN, height - 28), result.format, MUTED, ImageFont.load_default(26), anchor="rs")
    half = (width - 3 * MARGIN) // 2
    sides = (("before", result.before, result.originals, BEFORE), ("after", result.after, result.quantized, AFTER))
    for index, (label, size, images, color) in enumerate(sides):
        left = MARGIN + index * (half + MARGIN)
        draw.text((left, HEAD - 20), label, color, ImageFont.load_default(38), anchor="ls")
        draw.text((left + 130, HEAD - 20), human_size(size), color, ImageFont.load_default(64), anchor="ls")
        box = (left, HEAD, half, height - HEAD - FOOT - MARGIN // 2)
        if images:
            _paste_grid(sheet, images, box)
        elif not result.chart:
            _draw_bar(draw, box, size / result.before, color)
    if result.chart:
        _paste_centered(sheet, result.chart, (MARGIN, HEAD, width - 2 * MARGIN, height - HEAD - FOOT - MARGIN // 2))
    return sheet


def _paste_grid(sheet: Image.Image, images: Sequence[Image.Image], box: tuple[int, int, int, int]) -> None:
    """Two rows of images, as large as the box allows."""
    left, top, width, height = box
    columns = -(-len(images) // 2)
    side = min(width // columns, height // 2)
    for index, image in enumerate(images):
        at = (left + index % columns * side, top + index // columns * side)
        sheet.paste(image.resize((side, side), Image.Resampling.LANCZOS), at)


def _draw_bar(draw: ImageDraw.ImageDraw, box: tuple[int, int, int, int], share: float, color: str) -> None:
    """A block whose height is a share of the box."""
    left, top, width, height = box
    draw.rounded_rectangle((left, top + round(height * (1 - share)), left + width // 2, top + height), 12, color)


def _paste_centered(sheet: Image.Image, image: Image.Image, box: tuple[int, int, int, int]) -> None:
    """An image, scaled into the box."""
    left, top, width, height = box
    scale = min(width / image.width, height / image.height)
    size = (round(image.width * scale), round(image.height * scale))
    sheet.paste(image.resize(size, Image.Resampling.LANCZOS), (left + (width - size[0]) // 2, top))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = sorted(path.stem for path in EXAMPLES.glob("*.json"))
    parser.add_argument("--only", choices=names, nargs="+", help="only these examples; default: all")
    args = parser.parse_args()
    host = find_host()
    for name in args.only or names:
        path = EXAMPLES / f"{name}.jpg"
        result = plan_result(*PLANNED[name]) if name in PLANNED else run_example(host, name)
        draw_thumbnail(result).save(path, quality=88)
        print(path, flush=True)


if __name__ == "__main__":
    main()
