"""Formats that this ComfyUI cannot run, and layers of this pack that dequantize them."""

import inspect
from collections.abc import Container, Mapping
from pathlib import Path

import comfy.ops
import comfy.quant_ops
import torch

from ...quant_core.errors import QuantizationError
from ...quant_core.formats import detect_layer
from ...quant_core.formats.kinds import find_kinds
from ...quant_core.formats.layer_json import layer_configs, loaded_configs
from ...quant_core.formats.smoothing import SMOOTHING_KEY
from ...quant_core.sources import SafetensorsFile
from ..runtime.decoded_linear import make_decoding_operations

__all__ = [
    "check_kinds",
    "classic_options",
    "decoding_options",
    "layers_to_decode",
    "make_quantized_linear",
    "supports_format",
    "supports_layer",
]


def supports_format(format: object) -> bool:
    """Whether this ComfyUI itself runs layers of that format; False of None."""
    return format in getattr(comfy.quant_ops, "QUANT_ALGOS", {})


def supports_layer(config: Mapping[str, object], suffixes: Container[str]) -> bool:
    """Whether this ComfyUI itself runs a layer with that JSON and tensors; before 0.30 it ignores ``pre_quant_scale``."""
    if not supports_format(config.get("format")):
        return False
    return SMOOTHING_KEY not in suffixes or SMOOTHING_KEY in comfy.quant_ops.QUANT_ALGOS[config["format"]]["parameters"]


def layers_to_decode(path: Path) -> list[str]:
    """The quantized layers of a file with a format that this ComfyUI cannot run; empty where it runs all formats.

    Raises:
        QuantizationError: this pack cannot dequantize one of the layers.
    """
    with SafetensorsFile(path) as file:
        configs, tensors = layer_configs(file)[0], file.tensors
    suffixes = {layer: {SMOOTHING_KEY} if f"{layer}.{SMOOTHING_KEY}" in tensors else () for layer in configs}
    if all(supports_layer(config, suffixes[layer]) for layer, config in configs.items()):
        return []
    try:
        for layer, config in configs.items():
            detect_layer(layer, config, tensors)
    except ValueError as error:
        raise QuantizationError(f"{path.name} cannot be loaded: {error}.") from None
    return list(configs)


def check_kinds(file: SafetensorsFile) -> None:
    """Raise QuantizationError for quantized values without layer JSON that ComfyUI would take for weights, or not load."""
    configs = loaded_configs(file)
    unread = (
        (kind, layer)
        for layer, kind in find_kinds(file).items()
        if not (kind.loaded or configs.get(layer, {}).get("format"))
    )
    if wrong := min(unread, default=None):
        kind, layer = wrong
        raise QuantizationError(
            f"{file.name} cannot be loaded: it contains {kind.name}, such as {layer}. {kind.support}."
        )


def classic_options(loader) -> dict:
    """Options of one of ComfyUI's loaders that turn off the dynamic loading of newer releases."""
    return {"disable_dynamic": True} if "disable_dynamic" in inspect.signature(loader).parameters else {}


def decoding_options(loader, options: str = "model_options") -> dict:
    """Options that make one of ComfyUI's loaders use our decoding layers.

    Dynamic loading is turned off because it applies LoRAs to ComfyUI's own layers only.
    """
    return {options: {"custom_operations": make_decoding_operations(comfy.ops.manual_cast)}, **classic_options(loader)}


def make_quantized_linear(
    name: str, tensors: dict[str, torch.Tensor], config: dict, bias=None, dtype=torch.float32, device=None
):
    """A quantized linear layer outside of a model: ComfyUI's own where it runs the format, else a decoding layer.

    Args:
        tensors: the layer's tensors by suffix, as in a file.
        config: the layer's JSON.
        bias: replaces the bias of ``tensors``; without both the layer has no bias.
        dtype: compute dtype of the layer.
    """
    if supports_layer(config, tensors):
        operations = comfy.ops.mixed_precision_ops({name: config}, dtype, full_precision_mm=True)
    else:
        operations = make_decoding_operations(comfy.ops.manual_cast)
    state = {f"{name}.{suffix}": tensor for suffix, tensor in tensors.items()}
    if bias is not None:
        state[f"{name}.bias"] = bias
    outer, inner = detect_layer(name, config, state).weight_shape(tuple(tensors["weight"].shape), config)
    linear = operations.Linear(inner, outer, bias=f"{name}.bias" in state, device=device, dtype=dtype)
    linear._load_from_state_dict(state, f"{name}.", {}, True, [], [], [])
    return linear
