"""Preview of a run over a model file, for the page: before the run, so without its weights."""

import comfy.model_management
import torch

from ...quant_core import Recipe
from ...quant_core.formats import Codec
from ...quant_core.formats.cards import find_support
from ...quant_core.run.preview import RunPreview, preview_run
from .decoding import supports_codec
from .folders import FileSource
from .model_facts import device_capability
from .opening import open_file
from .quantizing import exclude_unreadable

__all__ = ["describe_device", "find_stock_support", "preview_file"]


def preview_file(file: FileSource, recipe: Recipe, *, calibrated: bool, general: bool) -> RunPreview:
    """:func:`~.preview_run` of a file on ComfyUI's device, with the text encoders left out that this ComfyUI would not load."""
    with open_file(file) as weights:
        device = comfy.model_management.get_torch_device()
        return preview_run(weights, exclude_unreadable(recipe, weights), device, calibrated=calibrated, general=general)


def describe_device() -> str:
    """Name of ComfyUI's device, without its index and memory allocator: "NVIDIA GeForce RTX 4090", "CPU"."""
    device = comfy.model_management.get_torch_device()
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper()


def find_stock_support(codec: Codec) -> tuple[str, str]:
    """(support, elements of quantized activations) of layers of this codec on ComfyUI's device, without this pack.

    The support is "native", "decoded" or "unsupported", see :data:`~.cards.Support`; the elements are empty unless it is native.
    """
    capability = device_capability()
    support = find_support(codec, capability) if supports_codec(codec) else "unsupported"
    return support, codec.activation_elements(capability).name if support == "native" else ""
