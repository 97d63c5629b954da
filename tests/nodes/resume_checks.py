"""Checks of in_process.py: a server that dies while it quantizes, and the one that is started after it."""

import json
import os
import shutil
from pathlib import Path

import comfy.sd
import comfy.utils
import folder_paths
from pack.nodes import host
from pack.quant_core import Recipe, pipeline
from pack.quant_core.events import LayerFinished

ASSETS = Path(host.__file__).parents[2] / "assets"
RECIPE = Recipe(format="int8_tensorwise", rounding="nearest")
LAYERS = 20  # that are finished when the server dies


def source(kind: str):
    """A file, or a MODEL with a LoRA."""
    path = ASSETS / "tiny_mmdit_emoji.safetensors"
    if kind == "file":
        return host.FileSource(path, "diffusion_models", "")
    lora = comfy.utils.load_torch_file(str(ASSETS / "tiny_lora_red.safetensors"))
    return comfy.sd.load_lora_for_models(comfy.sd.load_diffusion_model(str(path)), None, lora, 1.0, 0.0)[0]


def die(kind: str) -> None:
    """Ends the process in the middle of a run, as kill -9 does, but that the test hears of it."""
    finished = []

    def listen(event) -> None:
        finished.extend([event.name] if isinstance(event, LayerFinished) else [])
        if len(finished) == LAYERS:
            print("RESULT" + json.dumps(files()), flush=True)
            os._exit(0)

    host.quantize(source(kind), RECIPE, listen)


def files() -> list[str]:
    """Everything that lies in ComfyUI's folders beside models and what was there from the start, by its ending."""
    temp = Path(folder_paths.get_temp_directory())
    kept = temp.parent / ".learned_rounding"
    return sorted(path.suffix for folder in (temp, kept, temp.parent / "output") for path in folder.rglob("*") if path.is_file())


def run_again(kind: str) -> dict:
    """ComfyUI empties its temp folder when it starts; then the same run, the same in another order of things, and another."""
    shutil.rmtree(folder_paths.get_temp_directory(), ignore_errors=True)
    made, real = [], pipeline.quantize_weight

    def quantize_weight(weight, *args, **options):
        made.append(tuple(weight.shape))
        return real(weight, *args, **options)

    pipeline.quantize_weight = quantize_weight

    def run(recipe=RECIPE) -> tuple[int, bytes, list]:
        made.clear()
        events = []
        quantized = host.quantize(source(kind), recipe, events.append)
        return len(made), quantized.files[""].read_bytes(), [event.name for event in events if isinstance(event, LayerFinished)]

    count, data, told = run()
    run(Recipe(rounding="nearest"))  # so that the last result is another one's
    again, same, told_again = run()
    return {"made": count, "all": again, "same": data == same, "told": told == told_again, "left": files()}


CHECKS = {f"resume_{step.__name__}_{kind}": lambda step=step, kind=kind: step(kind) for step in (die, run_again) for kind in ("file", "model")}
