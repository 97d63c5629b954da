"""Checks of in_process.py: a server killed while it quantizes, the next server, and two servers at the same time."""

import json
import os
import shutil
import time
from pathlib import Path

import comfy.sd
import comfy.utils
import folder_paths
from pack.nodes import host
from pack.quant_core import Recipe
from pack.quant_core.events import LayerFinished, RunFinished
from pack.quant_core.run import loop

ASSETS = Path(host.__file__).parents[2] / "assets"
RECIPE = Recipe(format="int8_tensorwise", convrot=False, rounding="nearest")
RECIPES = {"file": RECIPE, "model": RECIPE, "four bits": Recipe(format="asym_w4a8_int8", rounding="auto")}
LAYERS = 20  # finished layers when the server is killed


def source(kind: str):
    """A file, or a MODEL with a LoRA."""
    path = ASSETS / "tiny_mmdit_emoji.safetensors"
    if kind != "model":
        return host.FileSource(path, "diffusion_models", "")
    lora = comfy.utils.load_torch_file(str(ASSETS / "tiny_lora_red.safetensors"))
    return comfy.sd.load_lora_for_models(comfy.sd.load_diffusion_model(str(path)), None, lora, 1.0, 0.0)[0]


def die(kind: str) -> None:
    """End the process during a run as kill -9 does, after reporting to the test."""
    finished = []

    def listen(event) -> None:
        finished.extend([event.name] if isinstance(event, LayerFinished) else [])
        if len(finished) == LAYERS:
            print("RESULT" + json.dumps(files()), flush=True)
            os._exit(0)

    host.quantize(source(kind), RECIPES[kind], listen)


def files() -> list[str]:
    """Suffixes of all files in ComfyUI's temp and output folders and in the folder of unfinished runs."""
    temp = Path(folder_paths.get_temp_directory())
    kept = temp.parent / ".learned_rounding"
    return sorted(
        path.suffix for folder in (temp, kept, temp.parent / "output") for path in folder.rglob("*") if path.is_file()
    )


def run_again(kind: str) -> dict:
    """Empty the temp folder as ComfyUI does at its start; repeat the run, then another one, then the first again."""
    shutil.rmtree(folder_paths.get_temp_directory(), ignore_errors=True)
    made, real = [], loop.quantize_layer

    def quantize_layer(layer, *args, **options):
        made.append(tuple(layer.weight.shape))
        return real(layer, *args, **options)

    loop.quantize_layer = quantize_layer

    def run(recipe=RECIPES[kind]) -> tuple[int, bytes, list]:
        made.clear()
        events = []
        quantized = host.quantize(source(kind), recipe, events.append)
        return (
            len(made),
            quantized.files[""].read_bytes(),
            [event.name for event in events if isinstance(event, LayerFinished)],
        )

    count, data, told = run()
    run(Recipe(rounding="nearest"))  # replaces the cached result
    again, same, told_again = run()
    return {"made": count, "all": again, "same": data == same, "told": told == told_again, "left": files()}


def at_once() -> dict:
    """Another server in the same folder makes the same or another run during a run of this one."""
    moments = {
        "in the middle": lambda event: isinstance(event, LayerFinished) and event.index == LAYERS,
        "at the end": lambda event: isinstance(event, RunFinished),  # finished, and not yet moved to the temp folder
    }

    def run(recipe, listen=lambda event: None) -> bytes:
        host.quantizing._last = None
        return host.quantize(source("file"), recipe, listen).files[""].read_bytes()

    others = {"something else": Recipe(rounding="nearest"), "the same": RECIPE}
    alone, found = {name: run(recipe) for name, recipe in others.items()}, {}
    for moment, is_now in moments.items():
        for name, recipe in others.items():
            made = []
            ours = run(
                RECIPE,
                lambda event, recipe=recipe, is_now=is_now, made=made: (
                    made.append(run(recipe)) if is_now(event) else None
                ),
            )
            found[f"{name}, {moment}"] = ours == alone["the same"] and made == [alone[name]]
    return {"found": found, "left": files()}


def left_for_good() -> dict:
    """Finished files of killed servers that were not moved to the temp folder: two days old and new."""
    folder = Path(folder_paths.get_temp_directory()).parent / ".learned_rounding"
    folder.mkdir()
    old, new = (folder / f"diffusion_models_{name}.safetensors" for name in ("old", "new"))
    for path in (old, new):
        path.write_bytes(b"a model")
    long_ago = time.time() - 2 * 86_400
    os.utime(old, (long_ago, long_ago))
    host.quantize(source("file"), RECIPE, lambda event: None)
    return {"left": sorted(path.name for path in folder.iterdir())}


CHECKS = {
    f"resume_{step.__name__}_{kind}": lambda step=step, kind=kind: step(kind)
    for step in (die, run_again)
    for kind in RECIPES
}
CHECKS |= {"resume_at_once": at_once, "resume_left_for_good": left_for_good}
