"""Thumbnails of the examples for the template browser: each after a run with the tiny model.

python benchmarks/thumbnails.py      writes example_workflows/NAME.jpg, with the newest installed host
"""

import argparse
import io
import tempfile

from learned_rounding.benchmarks.screenshots import PROMPTS, ROOT, SETTINGS, STYLE, wait_until_finished
from learned_rounding.benchmarks.tiny_model.examples import place_further, with_tiny_model
from learned_rounding.benchmarks.tiny_model.place import place
from learned_rounding.hosts import ComfyServer, find_host
from learned_rounding.hosts.browser import load_workflow, open_page, queue_prompt, view

FOLDER = ROOT / "example_workflows"
SIZE = (960, 600)
PAGE = (1920, 1335)  # the area without toolbars, FREE, has the aspect ratio of SIZE
FREE = {"x": 90, "y": 120, "width": 1800, "height": 1125}
# Nodes to show in full; others may be cut off.
NODES = (
    "LearnedRoundingQuantize",
    "LearnedRoundingSave",
    "LearnedRoundingCalibrate",
    "LearnedRoundingCompare",
    "SaveImage",
    "PreviewImage",
)


def main() -> None:
    from PIL import Image

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = sorted(path.stem for path in FOLDER.glob("*.json"))
    parser.add_argument("--only", choices=names, nargs="+", help="only these examples; default: all")
    args = parser.parse_args()
    host = find_host()
    for name in args.only or names:
        # A new server per example: ComfyUI does not execute, and show, cached nodes again.
        with tempfile.TemporaryDirectory(prefix="comfyui-") as base, ComfyServer(host, base=base) as server:
            place(server.base, output_dir=server.output_dir, prompts=PROMPTS)
            place_further(server.base)
            with open_page(server, settings=SETTINGS, size=PAGE, timeout=600) as page:
                load_workflow(page, with_tiny_model(name, server.object_info()))
                wait_until_finished(page, queue_prompt(page, wait=False))
                view(page, NODES)
                image = Image.open(io.BytesIO(page.screenshot(clip=FREE, style=STYLE))).convert("RGB")
        image.resize(SIZE, Image.Resampling.LANCZOS).save(FOLDER / f"{name}.jpg", quality=88)
        print(FOLDER / f"{name}.jpg", flush=True)


if __name__ == "__main__":
    main()
