"""Facts about a MODEL in memory: the size of its weights, and whether its layers quantize their activations here."""

from collections import Counter
from collections.abc import Iterator

import comfy.model_management
import torch

from ...kernels.devices import compute_capability, is_nvidia
from ...quant_core.formats import READABLE
from .sources import is_quantized

__all__ = ["count_activations", "device_capability", "weight_bytes"]


def device_capability() -> tuple[int, int]:
    """Compute capability of ComfyUI's device; (0, 0) for a CPU and other devices without FP8 and FP4, where such weights are decoded."""
    device = comfy.model_management.get_torch_device()
    return compute_capability(device) if device.type == "cuda" and is_nvidia() else (0, 0)


def weight_bytes(model) -> int:
    """Bytes of the weights of a MODEL's diffusion model in memory, with their scales, wherever they are at the moment."""
    state = model.model_state_dict("diffusion_model.")
    return sum((tensor._qdata if is_quantized(tensor) else tensor).nbytes for tensor in state.values())


def count_activations(model) -> Counter[tuple[str, bool]]:
    """(format, whether activations are quantized here) → number of quantized layers of a MODEL's diffusion model."""
    return Counter(_quantized_formats(model.model.diffusion_model))


def _quantized_formats(model: torch.nn.Module) -> Iterator[tuple[str, bool]]:
    capability = device_capability()
    for module in model.modules():
        weight = getattr(module, "weight", None)
        codec = getattr(module, "codec", None)
        if codec is not None and getattr(module, "is_quantized", False):  # a decoding layer of this pack
            yield codec.format.name, False
        elif weight is not None and is_quantized(weight):
            format = READABLE.get(_find_format(module, weight))
            native = format is not None and format.activations is not None and capability >= format.native_since
            ignored = format is not None and format.full_precision_matmul == "never"
            name = format.name if format else type(module).__name__
            yield name, native and (ignored or not getattr(module, "_full_precision_mm", False))


def _find_format(module: torch.nn.Module, weight) -> str:
    """Name of the format of a layer of ComfyUI; 0.3.75 does not store it, and has FP8 only."""
    return getattr(module, "quant_format", None) or str(weight._qdata.dtype).removeprefix("torch.")
