"""Formats that this ComfyUI cannot run, and layers of this pack that dequantize them."""

import inspect
from collections.abc import Container
from pathlib import Path

import comfy.ops
import comfy.quant_ops
import torch

from ...quant_core.errors import QuantizationError
from ...quant_core.formats import Codec, detect_layer
from ...quant_core.formats.kinds import find_kinds, quantized_formats
from ...quant_core.formats.layer_json import layer_configs, loaded_configs
from ...quant_core.formats.smoothing import SMOOTHING_KEY
from ...quant_core.sources import SafetensorsFile
from ..runtime.decoded_linear import make_decoding_operations
from .expanding import is_expanded, runs_in_kitchen

__all__ = [
    "check_kinds",
    "classic_options",
    "decoding_options",
    "describe_formats",
    "layers_to_decode",
    "make_quantized_linear",
    "supports_codec",
    "supports_format",
]


# What runs a layer, for users.
_RUN = "run by ComfyUI itself"
_EXPANDED = "run by ComfyUI as INT8 layers of the same values"
_DECODED = "decoded as they run"


def supports_format(format: object) -> bool:
    """Whether this ComfyUI itself runs layers of that format; False of None."""
    return format in getattr(comfy.quant_ops, "QUANT_ALGOS", {})


def _ignores_scale(format: str, suffixes: Container[str]) -> bool:
    """Whether this ComfyUI leaves the ``pre_quant_scale`` of a layer out, as releases before 0.30 do."""
    return SMOOTHING_KEY in suffixes and SMOOTHING_KEY not in comfy.quant_ops.QUANT_ALGOS[format]["parameters"]


def supports_codec(codec: Codec) -> bool:
    """Whether this ComfyUI itself runs layers of that codec, or the INT8 layers that they are expanded to."""
    return supports_format(codec.format.name) and (runs_in_kitchen(codec) or is_expanded(codec))


def _describe_way(layer: str, config: dict, tensors) -> str:
    """How a layer of a file is run here: one of the texts above. Layers that are not valid are left to ComfyUI's loader."""
    smoothed = {SMOOTHING_KEY} if f"{layer}.{SMOOTHING_KEY}" in tensors else set()
    if not supports_format(config.get("format")) or _ignores_scale(config["format"], smoothed):
        return _DECODED
    try:
        codec = detect_layer(layer, config, tensors)
    except ValueError:
        return _RUN
    return _RUN if runs_in_kitchen(codec) else _EXPANDED if is_expanded(codec) else _DECODED


def layers_to_decode(path: Path) -> list[str]:
    """The quantized layers of a file with a layer that this ComfyUI cannot run; empty where it runs all of them.

    Raises:
        QuantizationError: this pack cannot dequantize one of the layers.
    """
    with SafetensorsFile(path) as file:
        configs, tensors = layer_configs(file)[0], file.tensors
    if all(_describe_way(layer, config, tensors) != _DECODED for layer, config in configs.items()):
        return []
    try:
        for layer, config in configs.items():
            detect_layer(layer, config, tensors)
    except ValueError as error:
        raise QuantizationError(f"{path.name} cannot be loaded: {error}.") from None
    return list(configs)


def describe_formats(path: Path) -> str:
    """The formats of a quantized file and what runs them, for users: "int8_tensorwise, run by ComfyUI itself"."""
    ways: dict[str, set[str]] = {}
    with SafetensorsFile(path) as file:
        formats = quantized_formats(file)
        for layer, config in layer_configs(file)[0].items():
            ways.setdefault(_describe_way(layer, config, file.tensors), set()).add(str(config.get("format")))
    others = [f"{way}: {', '.join(sorted(ways[way]))}" for way in (_DECODED, _EXPANDED) if way in ways]
    return f"{', '.join(formats)}, {'; '.join(others) or _RUN}"


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


def make_quantized_linear(name: str, tensors: dict[str, torch.Tensor], config: dict, dtype=torch.float32, device=None):
    """A quantized linear layer outside of a model: ComfyUI's own where it runs the format, else a decoding layer.

    A bank of experts is ComfyUI's own ``MoEExperts``.

    Args:
        tensors: the layer's tensors by suffix, as in a file.
        config: the layer's JSON.
        dtype: compute dtype of the layer.
    """
    state = {f"{name}.{suffix}": tensor for suffix, tensor in tensors.items()}
    codec = detect_layer(name, config, state)
    if supports_codec(codec) and not _ignores_scale(codec.format.name, tensors):
        operations = comfy.ops.mixed_precision_ops({name: config}, dtype, full_precision_mm=True)
    else:
        operations = make_decoding_operations(comfy.ops.manual_cast)
    *bank, outer, inner = codec.original_shape(tuple(tensors["weight"].shape), config)
    make = operations.MoEExperts if bank else operations.Linear
    linear = make(*bank, inner, outer, bias=f"{name}.bias" in state, device=device, dtype=dtype)
    linear._load_from_state_dict(state, f"{name}.", {}, True, [], [], [])
    return linear
