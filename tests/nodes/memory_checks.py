"""Checks of in_process.py: another model occupies the memory of the GPU."""

import dataclasses
import logging.handlers
from pathlib import Path

import comfy.model_management
import comfy.model_patcher
import comfy.ops
import folder_paths
import torch
from pack.nodes import host
from pack.quant_core import Recipe, layer
from safetensors.torch import save_file

SIDE = 8192  # a layer of 128 MiB
FREE = 512 << 20  # free bytes; a layer needs more
RECIPE = Recipe(format="int8_tensorwise", rounding="nearest", preset="none")


def weights(count: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(SIDE, SIDE, generator=generator).bfloat16()
    return {f"blocks.{index}.weight": weight.roll(index) for index in range(count)}


def other_model():
    """A model of 16 layers on the GPU."""
    operations = comfy.ops.disable_weight_init
    layers = [operations.Linear(SIDE, SIDE, bias=False, dtype=torch.bfloat16, device="cpu") for _ in range(16)]
    for linear, weight in zip(layers, weights(16).values(), strict=True):
        linear.weight = torch.nn.Parameter(weight, requires_grad=False)
    device = comfy.model_management.get_torch_device()
    patcher = comfy.model_patcher.ModelPatcher(
        torch.nn.Sequential(*layers), load_device=device, offload_device=torch.device("cpu")
    )
    comfy.model_management.load_models_gpu([patcher])
    return patcher


def squeezed() -> dict:
    """The run unloads the other model, which is restored afterwards; without that the memory is too small for the run."""
    path = Path(folder_paths.base_path) / "layers.safetensors"
    save_file(weights(4), path)
    device = comfy.model_management.get_torch_device()
    warnings = logging.handlers.BufferingHandler(100)  # warns when a layer is quantized with less memory or on the CPU
    layer.log.addHandler(warnings)

    def quantized(seed: int) -> bytes:
        recipe = dataclasses.replace(RECIPE, seed=seed)
        return (
            host.quantize(host.FileSource(path, "diffusion_models", ""), recipe, lambda event: None)
            .files[""]
            .read_bytes()
        )

    def in_little_memory() -> tuple[bytes, list[str]]:
        """Quantize with only FREE bytes of GPU memory; returns the file and the warnings."""
        quantized(1)  # replaces the cached result
        comfy.model_management.load_models_gpu([other])
        torch.cuda.empty_cache()
        filler = torch.empty(torch.cuda.mem_get_info()[0] - FREE, dtype=torch.uint8, device=device)
        warnings.buffer.clear()
        try:
            made = quantized(0)
        finally:
            del filler
        return made, [record.getMessage() for record in warnings.buffer]

    alone = quantized(0)
    other = other_model()
    x = torch.ones(1, SIDE, dtype=torch.bfloat16, device=device)
    before, loaded = other.model(x), other.loaded_size()
    made, warned = in_little_memory()
    during = other.loaded_size()
    comfy.model_management.load_models_gpu([other])
    came_back = other.loaded_size() == loaded and bool(torch.equal(other.model(x), before))
    free_memory, comfy.model_management.free_memory = comfy.model_management.free_memory, lambda *args, **options: []
    try:
        without, warned_without = in_little_memory()
    finally:
        comfy.model_management.free_memory = free_memory
    return {
        "same": alone == made == without,
        "gave way": loaded - during,
        "warned": warned,
        "warned without": warned_without,
        "stayed without": other.loaded_size() == loaded,
        "came back": came_back,
    }


CHECKS = {"memory_squeezed": squeezed}
