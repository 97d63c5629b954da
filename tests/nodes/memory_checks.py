"""Checks of in_process.py: another model occupies the memory of the GPU, and requests to free memory."""

import contextlib
import functools
import logging.handlers
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import comfy.model_management
import comfy.model_patcher
import comfy.ops
import folder_paths
import torch
from pack.nodes import host
from pack.quant_core import Recipe
from pack.quant_core.errors import OutOfMemoryError
from safetensors.torch import save_file

SIDE = 8192  # a layer of 128 MiB
RECIPE = Recipe(format="int8_tensorwise", convrot=False, rounding="nearest", preset="none")


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


@contextlib.contextmanager
def small_card(free: int):
    """A GPU with ``free`` bytes of memory beside what this process holds, whatever the real one has and others use.

    The allocator gets no more, and torch reports no more to ComfyUI.
    """
    torch.cuda.empty_cache()
    size = torch.cuda.memory_reserved() + free
    torch.cuda.set_per_process_memory_fraction(size / torch.cuda.get_device_properties(0).total_memory)
    mem_get_info, torch.cuda.mem_get_info = (
        torch.cuda.mem_get_info,
        lambda device=None: (max(size - torch.cuda.memory_reserved(), 0), size),
    )
    try:
        yield
    finally:
        torch.cuda.mem_get_info = mem_get_info
        torch.cuda.set_per_process_memory_fraction(1.0)


def squeezed() -> dict:
    """The run unloads the other model, which is restored afterwards; without that the memory is too small for the run."""
    path = Path(folder_paths.base_path) / "layers.safetensors"
    save_file(weights(4), path)
    device = comfy.model_management.get_torch_device()
    warnings = logging.handlers.BufferingHandler(100)  # warns when a layer is quantized with less memory or on the CPU
    logging.getLogger("pack.quant_core").addHandler(warnings)

    def quantized() -> bytes:
        host.quantizing.forget_last_result()
        source = host.FileSource(path, "diffusion_models", "")
        return host.quantize(source, RECIPE, lambda event: None, general=True).files[""].read_bytes()

    alone = quantized()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    quantized()  # the first run may also measure kernels
    needed = torch.cuda.max_memory_allocated() - held

    def in_little_memory() -> tuple[bytes | None, list[str]]:
        """Quantize with half of the memory that a run needs; returns the file, None if it fails, and the warnings."""
        comfy.model_management.load_models_gpu([other])
        warnings.buffer.clear()
        with small_card(needed // 2):
            try:
                made = quantized()
            except OutOfMemoryError:
                made = None
        return made, [record.getMessage() for record in warnings.buffer]

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
        "needed": needed,
        "same": alone == made and without in (alone, None),
        "gave way": loaded - during,
        "warned": warned,
        "failed or warned without": without is None or bool(warned_without),
        "stayed without": other.loaded_size() == loaded,
        "came back": came_back,
    }


def requests() -> list[int]:
    """Times that our memory was released after each request to free memory, with wrappers of another pack before and after ours."""
    releasing = sys.modules["pack.nodes.host.releasing"]
    queue = SimpleNamespace(get_flags=lambda: {"free_memory": True})
    server = SimpleNamespace(instance=SimpleNamespace(prompt_queue=queue))
    released, counts = [], []

    def wrap() -> None:
        queue.get_flags = functools.wraps(queue.get_flags)(lambda take=queue.get_flags: take())

    with (
        patch.object(releasing, "PromptServer", server),
        patch.object(releasing, "forget_last_result", lambda: released.append(True)),
    ):
        for step in (wrap, host.follow_free_requests, wrap, host.follow_free_requests):
            step()
            queue.get_flags()
            counts.append(len(released))
    return counts


CHECKS = {"memory_squeezed": squeezed, "memory_requests": requests}
