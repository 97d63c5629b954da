"""Pictures of the examples for the template browser: what each looks like after a run with the tiny model.

python benchmarks/thumbnails.py      writes example_workflows/NAME.jpg, from the newest ComfyUI here
"""

import argparse
import io
import tempfile

from learned_rounding.benchmarks.screenshots import PROMPTS, ROOT, SETTINGS, STYLE, finished
from learned_rounding.benchmarks.tiny_model.examples import place_further, with_tiny_model
from learned_rounding.benchmarks.tiny_model.place import place
from learned_rounding.hosts import ComfyServer, available_hosts
from learned_rounding.hosts.browser import load_workflow, open_page, queue_prompt, view

FOLDER = ROOT / "example_workflows"
SIZE = (960, 600)
PAGE = (1920, 1335)  # what its bars leave free has the shape of a thumbnail
FREE = {"x": 90, "y": 120, "width": 1800, "height": 1125}
# What an example is about; other nodes stay at the edge, or outside.
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
    parser.add_argument("--only", choices=names, nargs="+", help="these examples; default: all")
    args = parser.parse_args()
    hosts = available_hosts()
    if not hosts:
        raise SystemExit("no ComfyUI on this machine: make hosts")
    for name in args.only or names:
        # A server of its own: what another example had made, ComfyUI would not make, and show, again.
        with tempfile.TemporaryDirectory(prefix="comfyui-") as base, ComfyServer(hosts[-1], base=base) as server:
            place(server.base, output_dir=server.output_dir, prompts=PROMPTS)
            place_further(server.base)
            with open_page(server, settings=SETTINGS, size=PAGE, timeout=600) as page:
                load_workflow(page, with_tiny_model(name, server.object_info()))
                finished(page, queue_prompt(page, wait=False))
                view(page, NODES)
                picture = Image.open(io.BytesIO(page.screenshot(clip=FREE, style=STYLE))).convert("RGB")
        picture.resize(SIZE, Image.Resampling.LANCZOS).save(FOLDER / f"{name}.jpg", quality=88)
        print(FOLDER / f"{name}.jpg", flush=True)


if __name__ == "__main__":
    main()
