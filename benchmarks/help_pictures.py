"""Images of the help pages: each node, after a run if it shows a result.

An image contains a workflow with the node in its metadata, so that it can be dropped on the canvas. It is run with the
tiny model.

    python benchmarks/help_pictures.py      writes web/docs/images/NODE.png, with the newest installed host
"""

import argparse
import copy
import io
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from learned_rounding.benchmarks.screenshots import SETTINGS, STYLE, wait_until_finished
from learned_rounding.benchmarks.tiny_model.examples import EXAMPLES as EXAMPLES_FOLDER
from learned_rounding.benchmarks.tiny_model.examples import place_further, with_tiny_parts
from learned_rounding.benchmarks.tiny_model.place import place
from learned_rounding.hosts import ComfyServer, find_host
from learned_rounding.hosts.browser import load_workflow, open_page, queue_prompt, view
from learned_rounding.hosts.workflows import Graph

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "web" / "docs" / "images"
COLORS = 64
MARGIN = 24  # CSS pixels around the node
PROMPTS = ("red apple", "owl")
SOURCE, QUANTIZED, CALIBRATION = (
    "diffusion_models/z_image_turbo_bf16.safetensors",
    "diffusion_models/z_image_turbo_int8.safetensors",
    "z_image_turbo",
)
# Node → example workflow that contains it.
EXAMPLES = {
    "LearnedRoundingLoadModel": "2 Quantize a model file",
    "LearnedRoundingConfigure": "2 Quantize a model file",
    "LearnedRoundingQuantize": "3 Calibrate and quantize",
    "LearnedRoundingSave": "2 Quantize a model file",
    "LearnedRoundingCalibrate": "4 Compare in numbers",
    "LearnedRoundingCompare": "4 Compare in numbers",
    "LearnedRoundingReport": "8 Quantize a checkpoint",
}
# Nodes whose workflow is not run: they show only widgets, or need a text encoder, which the tiny model does not have.
NOT_RUN = {f"LearnedRounding{name}" for name in ("Configure", "Options", "CalibrateText", "CompareText")}
# Files named in the workflows, created empty so that no node is marked as invalid.
PLACEHOLDERS = (
    "models/diffusion_models/z_image_turbo_bf16.safetensors",
    "models/diffusion_models/z_image_turbo_int8.safetensors",
    "models/text_encoders/t5xxl_fp16.safetensors",
    "models/vae/ae.safetensors",
)


def add_sampling(graph: Graph, clip: list) -> dict:
    """Add prompts and an empty latent; returns the inputs of a sampler."""
    conditioning = {
        name: graph.add("CLIPTextEncode", clip=clip, text=text)[0]
        for name, text in (("positive", "a red apple"), ("negative", ""))
    }
    return conditioning | {"latent_image": graph.add("EmptySD3LatentImage", width=1024, height=1024, batch_size=1)[0]}


def add_text_encoder(graph: Graph):
    return graph.add("CLIPLoader", clip_name="t5xxl_fp16.safetensors", type="flux")


def build_options() -> Graph:
    graph = Graph()
    chosen = graph.add("LearnedRoundingOptions", optimizer="adamw", num_iter=500)
    recipe = graph.add(
        "LearnedRoundingConfigure",
        format="int8_tensorwise",
        granularity="auto",
        preset="auto",
        seed=0,
        rounding="principal",
        options=chosen[0],
    )
    source = graph.add("LearnedRoundingLoadModel", model=SOURCE)
    quantized = graph.add("LearnedRoundingQuantize", source=source[0], recipe=recipe[0])
    graph.add("LearnedRoundingSave", quantized=quantized[2], filename_prefix="model", folder="output")
    return graph


def build_load_quantized() -> Graph:
    graph = Graph()
    loaded = graph.add("LearnedRoundingLoadQuantized", model=QUANTIZED)
    settings = add_sampling(graph, add_text_encoder(graph)[0])
    sampled = graph.add(
        "KSampler",
        model=loaded[0],
        seed=0,
        steps=20,
        cfg=4,
        sampler_name="euler",
        scheduler="simple",
        denoise=1,
        **settings,
    )
    decoded = graph.add("VAEDecode", samples=sampled[0], vae=graph.add("VAELoader", vae_name="ae.safetensors")[0])
    graph.add("SaveImage", images=decoded[0], filename_prefix="ComfyUI")
    return graph


def build_inspect() -> Graph:
    graph = Graph()
    graph.add("LearnedRoundingInspect", model=QUANTIZED)
    return graph


def build_save_calibration() -> Graph:
    graph = Graph()
    model = graph.add("UNETLoader", unet_name=Path(SOURCE).name, weight_dtype="default")
    settings = {
        "seed": 0,
        "steps": 20,
        "cfg": 4,
        "sampler_name": "euler",
        "scheduler": "simple",
        "samples": 4,
        "keep": "full",
        "tokens": 256,
    }
    calibrated = graph.add(
        "LearnedRoundingCalibrate", model=model[0], **settings, **add_sampling(graph, add_text_encoder(graph)[0])
    )
    graph.add("LearnedRoundingSaveCalibration", calibration=calibrated[0], filename_prefix=CALIBRATION)
    return graph


def build_load_calibration() -> Graph:
    """Workflow that loads the file saved by :func:`build_save_calibration`."""
    graph = Graph()
    loaded = graph.add("LearnedRoundingLoadCalibration", file=f"{CALIBRATION}_00001_.calib.safetensors")
    source = graph.add("LearnedRoundingLoadModel", model=SOURCE)
    quantized = graph.add("LearnedRoundingQuantize", source=source[0], calibration=loaded[0])
    graph.add("LearnedRoundingSave", quantized=quantized[2], filename_prefix="z_image_turbo", folder="output")
    return graph


def build_text_encoders() -> Graph:
    graph = Graph()
    clip = add_text_encoder(graph)
    prompts = "a red apple on a table\nan owl at night\na sketch of a castle\na train in the snow"
    calibrated = graph.add(
        "LearnedRoundingCalibrateText", clip=clip[0], prompts=prompts, keep="full", seed=0, tokens=256
    )
    quantized = graph.add("LearnedRoundingQuantize", source=clip[0], calibration=calibrated[0])
    graph.add(
        "LearnedRoundingCompareText",
        reference=clip[0],
        compared=quantized[1],
        prompts="a blue bicycle\na fox by the sea",
    )
    graph.add("LearnedRoundingSave", quantized=quantized[2], filename_prefix="t5xxl", folder="output")
    return graph


# Node → function that builds a workflow with it; nodes that are in no example.
BUILDERS = {
    "LearnedRoundingOptions": build_options,
    "LearnedRoundingLoadQuantized": build_load_quantized,
    "LearnedRoundingInspect": build_inspect,
    "LearnedRoundingSaveCalibration": build_save_calibration,
    "LearnedRoundingLoadCalibration": build_load_calibration,
    "LearnedRoundingCalibrateText": build_text_encoders,
    "LearnedRoundingCompareText": build_text_encoders,
}


def take(page, node: str, object_info: Mapping) -> None:
    """Run the workflow of a node and save its image; ``object_info`` has the server's node definitions."""
    page.evaluate("() => window.app.refreshComboInNodes()")
    if node in EXAMPLES:
        load_workflow(page, EXAMPLES_FOLDER / f"{EXAMPLES[node]}.json")
    else:
        load_workflow(page, BUILDERS[node]())
    workflow = page.evaluate("() => window.app.graph.serialize()")
    if node not in NOT_RUN:
        load_workflow(page, with_tiny_parts(copy.deepcopy(workflow), object_info))
        wait_until_finished(page, queue_prompt(page, wait=False))
    at = view(page, [node], zoom=1, alone=True)
    clip = {
        "x": at["x"] - MARGIN,
        "y": at["y"] - MARGIN,
        "width": at["width"] + 2 * MARGIN,
        "height": at["height"] + 2 * MARGIN,
    }
    image = Image.open(io.BytesIO(page.screenshot(clip=clip, style=STYLE)))
    info = PngInfo()
    info.add_text("workflow", json.dumps(workflow))
    image.convert("RGB").quantize(COLORS).save(OUT / f"{node}.png", pnginfo=info, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only",
        choices=[*EXAMPLES, *BUILDERS],
        nargs="+",
        help="only these nodes, in an order that creates files before they are loaded; default: all",
    )
    args = parser.parse_args()
    OUT.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="comfyui-") as base, ComfyServer(find_host(), base=base) as server:
        place(server.base, output_dir=server.output_dir, prompts=PROMPTS)
        place_further(server.base)
        for name in PLACEHOLDERS:
            path = server.base / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        with open_page(server, settings=SETTINGS, size=(1400, 1400), timeout=600) as page:
            for node in args.only or (*EXAMPLES, *BUILDERS):
                take(page, node, server.object_info())  # includes the files of earlier runs
                print(node, flush=True)
    print(sum(path.stat().st_size for path in OUT.glob("*.png")), "bytes in", OUT)


if __name__ == "__main__":
    main()
