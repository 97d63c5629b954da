"""Runs of a node: resumed after a kill, beside another server, with little memory; reports of several files."""

import contextlib
import logging.handlers
import os
import shutil
import time
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import save_file

from learned_rounding.quant_core import Recipe
from learned_rounding.quant_core.errors import OutOfMemoryError
from learned_rounding.quant_core.events import LayerFinished, RunFinished
from learned_rounding.quant_core.run import layer_task
from learned_rounding.quant_core.run.blocks import WalkSummary
from learned_rounding.quant_core.run.report import Report
from learned_rounding.tests.in_comfyui import IN_COMFYUI, call_in_new_process

if IN_COMFYUI:
    import comfy.model_management
    import comfy.model_patcher
    import comfy.ops
    import comfy.sd
    import comfy.utils
    import folder_paths

    from learned_rounding.nodes import host as pack
    from learned_rounding.nodes.host import quantizing
    from learned_rounding.nodes.ui import progress
    from learned_rounding.tests.nodes.host.tiny_model import ASSETS, TINY

pytestmark = pytest.mark.usefixtures("in_comfyui")

RECIPE = Recipe(format="int8_tensorwise", convrot=False, rounding="nearest")
RECIPES = {"file": RECIPE, "model": RECIPE, "four bits": Recipe(format="asym_w4a8_int8", rounding="auto")}
LAYERS = 20  # finished layers when the server is killed


def open_source(kind: str):
    """A file, or a MODEL with a LoRA."""
    if kind != "model":
        return pack.FileSource(TINY, "diffusion_models", "")
    lora = comfy.utils.load_torch_file(str(ASSETS / "tiny_lora_red.safetensors"))
    return comfy.sd.load_lora_for_models(comfy.sd.load_diffusion_model(str(TINY)), None, lora, 1.0, 0.0)[0]


def suffixes() -> list[str]:
    """Suffixes of all files in ComfyUI's temp and output folders and in the folder of unfinished runs."""
    temp = Path(folder_paths.get_temp_directory())
    folders = (temp, temp.parent / ".learned_rounding", temp.parent / "output")
    return sorted(path.suffix for folder in folders for path in folder.rglob("*") if path.is_file())


def quantize_and_die(kind: str) -> None:
    """End the process during a run as kill -9 does."""
    finished = []

    def listen(event) -> None:
        finished.extend([event.name] if isinstance(event, LayerFinished) else [])
        if len(finished) == LAYERS:
            os._exit(0)

    pack.quantize(open_source(kind), RECIPES[kind], listen)
    raise AssertionError("the run has fewer layers")


@pytest.mark.parametrize("kind", RECIPES)
def test_next_server_resumes_after_a_kill(tried, kind):
    call_in_new_process(quantize_and_die, kind)
    assert suffixes() == [".journal", ".partial"]
    shutil.rmtree(folder_paths.get_temp_directory())  # as ComfyUI does when it starts
    quantize_layer, made = layer_task.quantize_layer, []

    def count(*args, **options):
        made.append(args)
        return quantize_layer(*args, **options)

    def run(recipe=RECIPES[kind]) -> tuple[int, bytes, list[str]]:
        """Number of layers that were quantized, the file, and the layers of which listeners heard."""
        made.clear()
        told = []
        listen = lambda event: told.extend([event.name] if isinstance(event, LayerFinished) else [])  # noqa: E731
        quantized = pack.quantize(open_source(kind), recipe, listen)
        return len(made), quantized.files[""].read_bytes(), told

    with patch.object(layer_task, "quantize_layer", count):
        some, resumed, told = run()
        run(Recipe(rounding="nearest"))  # replaces the cached result
        every, undisturbed, told_again = run()
    assert some > 0
    assert some <= every - 18  # layers that were being written may be lost
    assert resumed == undisturbed
    assert told == told_again
    assert suffixes() == [".safetensors"]  # the last result, cached for other outputs
    tried("server killed while a node quantizes, then the same run in the next server", 1, "goes on, same bytes")


def quantize_anew(recipe, listen=lambda event: None) -> bytes:
    quantizing._last = None
    return pack.quantize(open_source("file"), recipe, listen).files[""].read_bytes()


MOMENTS = {
    "in the middle": lambda event: isinstance(event, LayerFinished) and event.index == LAYERS,
    "at the end": lambda event: isinstance(event, RunFinished),  # finished, and not yet moved to the temp folder
}


def test_two_servers_in_one_folder_write_separate_files(tried, subtests):
    """Another server makes the same or another run during a run of this one."""
    others = {"the same": RECIPE, "something else": Recipe(rounding="nearest")}
    alone = {name: quantize_anew(recipe) for name, recipe in others.items()}
    for moment, is_now in MOMENTS.items():
        for name, recipe in others.items():
            made = []

            def listen(event, recipe=recipe, is_now=is_now, made=made):
                if is_now(event):
                    made.append(quantize_anew(recipe))

            with subtests.test(f"{name}, {moment}"):
                assert quantize_anew(RECIPE, listen) == alone["the same"]
                assert made == [alone[name]]
    assert suffixes() == [".safetensors"]  # the last result, cached for other outputs
    tried("another server on the same folder quantizes meanwhile", 4, "each its own file, whole")


def test_abandoned_files_are_deleted_after_a_day(in_comfyui):
    """Finished files of killed servers that were not moved to the temp folder."""
    folder = in_comfyui / ".learned_rounding"
    folder.mkdir()
    for name in ("old", "new"):
        (folder / f"diffusion_models_{name}.safetensors").write_bytes(b"a model")
    long_ago = time.time() - 2 * 86_400
    os.utime(folder / "diffusion_models_old.safetensors", (long_ago, long_ago))
    quantize_anew(RECIPE)
    assert [path.name for path in folder.iterdir()] == ["diffusion_models_new.safetensors"]


def test_the_report_of_a_clip_keeps_the_summary_of_every_encoder():
    reports = {
        part: Report(
            part, "int8_tensorwise", "row", "sequential", "clip", seconds=1.0, bytes_in=4, bytes_out=2,
            taken_up=taken_up, sequential=WalkSummary("9.0", 4, error),
        )
        for part, error, taken_up in (("clip_l", 0.01, 3), ("t5xxl", 0.02, 4))
    }  # fmt: skip
    merged = quantizing._merge_reports(reports)
    message = progress._end_message(RunFinished(merged))
    assert list(message["model_errors"]) == [0.01, 0.02]
    assert message["resumed"] == 7
    lines = [line.split()[:5] for line in merged.table().splitlines() if line.startswith("model output")]
    assert lines == [
        ["model", "output,", "clip_l", "error", "0.01"],
        ["model", "output,", "t5xxl", "error", "0.02"],
    ]


SIDE = 8192  # a layer of 128 MiB


def large_weights(count: int) -> dict[str, torch.Tensor]:
    weight = torch.randn(SIDE, SIDE, generator=torch.Generator().manual_seed(0)).bfloat16()
    return {f"blocks.{index}.weight": weight.roll(index) for index in range(count)}


def load_other_model():
    """A model of 16 layers on the GPU."""
    operations = comfy.ops.disable_weight_init
    layers = [operations.Linear(SIDE, SIDE, bias=False, dtype=torch.bfloat16, device="cpu") for _ in range(16)]
    for linear, weight in zip(layers, large_weights(16).values(), strict=True):
        linear.weight = torch.nn.Parameter(weight, requires_grad=False)
    device = comfy.model_management.get_torch_device()
    patcher = comfy.model_patcher.ModelPatcher(
        torch.nn.Sequential(*layers), load_device=device, offload_device=torch.device("cpu")
    )
    comfy.model_management.load_models_gpu([patcher])
    return patcher


@contextlib.contextmanager
def small_card(free: int):
    """A GPU with ``free`` bytes of memory beside what this process holds, whatever the real one has and others use.

    The allocator gets no more, and torch reports no more to ComfyUI.
    """
    torch.cuda.empty_cache()
    size = torch.cuda.memory_reserved() + free
    torch.cuda.set_per_process_memory_fraction(size / torch.cuda.get_device_properties(0).total_memory)

    def mem_get_info(device=None):
        return max(size - torch.cuda.memory_reserved(), 0), size

    try:
        with patch.object(torch.cuda, "mem_get_info", mem_get_info):
            yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.mark.gpu
def test_run_frees_the_memory_of_another_model(tmp_path, tried):
    """The run unloads the other model, which is restored afterwards; without that the memory is too small for the run."""
    path = tmp_path / "layers.safetensors"
    save_file(large_weights(4), path)
    warnings = logging.handlers.BufferingHandler(100)  # warns when a layer is quantized with less memory or on the CPU
    logging.getLogger("learned_rounding.quant_core").addHandler(warnings)

    def quantize() -> bytes:
        quantizing.forget_last_result()
        source = pack.FileSource(path, "diffusion_models", "")
        recipe = Recipe(format="int8_tensorwise", convrot=False, rounding="nearest", preset="none")
        return pack.quantize(source, recipe, lambda event: None, general=True).files[""].read_bytes()

    alone = quantize()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    quantize()  # the first run may also measure kernels
    needed = torch.cuda.max_memory_allocated() - held

    def quantize_in_little_memory() -> tuple[bytes | None, list[str]]:
        """Quantize with half of the memory that a run needs; returns the file, None if it fails, and the warnings."""
        comfy.model_management.load_models_gpu([other])
        warnings.buffer.clear()
        with small_card(needed // 2):
            try:
                made = quantize()
            except OutOfMemoryError:
                made = None
        return made, [record.getMessage() for record in warnings.buffer]

    other = load_other_model()
    x = torch.ones(1, SIDE, dtype=torch.bfloat16, device=comfy.model_management.get_torch_device())
    before, loaded = other.model(x), other.loaded_size()
    made, warned = quantize_in_little_memory()
    assert made == alone
    assert other.loaded_size() < loaded
    assert warned == []
    comfy.model_management.load_models_gpu([other])
    assert other.loaded_size() == loaded
    assert torch.equal(other.model(x), before)
    with patch.object(comfy.model_management, "free_memory", lambda *args, **options: []):
        made, warned = quantize_in_little_memory()
    assert made in (alone, None)
    assert made is None or warned  # the run needs the memory of the other model
    assert other.loaded_size() == loaded
    tried("the GPU full with another model", 1, "that one gives way and comes back, same bytes")
