"""Layers that this ComfyUI's comfy-kitchen is too old to decode, loaded as INT8 layers of the same values.

ComfyUI 0.33.0 loads 6-bit layers of asym_w4a8_int8 without an error and fails when it samples. The values of such a layer are
INT8 numbers under one scale per row, so :mod:`.layouts` loads it as ``int8_tensorwise`` with ConvRot, which ComfyUI runs,
patches and saves. It takes 8 bits per weight in memory.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from importlib.metadata import version
from typing import cast

import comfy.ops
import comfy.quant_ops
import torch

from ...quant_core.formats import READABLE, Codec, Parts, detect_layer, make_codec
from ...quant_core.formats.asym_w4a8 import AsymW4A8Codec
from ...quant_core.formats.layer_json import CONFIG_KEY, config_tensor
from ...quant_core.formats.table import release_number

__all__ = [
    "LOADER",
    "ExpandedTensors",
    "expand_in_place",
    "expanded_codec",
    "is_expanded",
    "kitchen_version",
    "layer_parts",
    "runs_in_kitchen",
]

_FORMATS = frozenset(name for name, entry in READABLE.items() if entry.codec is AsymW4A8Codec)
LOADER = "_load_quantized_module"  # of comfy.ops; our wrapper of it has the attribute ``expands_layers``


@cache
def kitchen_version() -> str:
    """Release of the installed comfy-kitchen: "0.2.31"."""
    found = re.match(r"\d+(\.\d+)*", version("comfy-kitchen"))
    return found[0] if found else "0"


def runs_in_kitchen(codec: Codec) -> bool:
    """Whether the installed comfy-kitchen is new enough for layers of a format that this ComfyUI has."""
    since = codec.kitchen_since
    return since is None or release_number(kitchen_version()) >= release_number(since)


def is_expanded(codec: Codec) -> bool:
    """Whether ComfyUI's loaders make an INT8 layer of a layer of that codec here."""
    return (
        codec.format.name in getattr(comfy.quant_ops, "QUANT_ALGOS", {})
        and getattr(getattr(comfy.ops, LOADER, None), "expands_layers", False)
        and not runs_in_kitchen(codec)
    )


def expanded_codec(codec: Codec) -> Codec:
    """The codec of the INT8 layers that layers of ``codec`` are expanded to."""
    return make_codec("int8_tensorwise", "row", convrot=codec.rotation and codec.rotation.size)


# Suffix → function (codec, tensors of the layer by suffix) that makes that tensor of the INT8 layer.
_EXPANDED: Mapping[str, Callable[[AsymW4A8Codec, Parts], torch.Tensor]] = {
    "weight": AsymW4A8Codec.decode_int8,
    "weight_scale": lambda _, parts: parts["weight_s_channel"].float().reshape(-1, 1),
    CONFIG_KEY: lambda codec, _: config_tensor(expanded_codec(codec).config),
}


def expand_in_place(config: dict, state_dict: dict[str, torch.Tensor], prefix: str) -> None:
    """Replace the tensors of the layer under ``prefix`` by those of an INT8 layer where comfy-kitchen is too old for it.

    ``config``: its JSON. A layer that is not valid is left to ComfyUI's loader.
    """
    if config.get("format") not in _FORMATS:
        return
    try:
        codec = detect_layer(prefix.removesuffix("."), config, state_dict)
    except ValueError:
        return
    if isinstance(codec, AsymW4A8Codec) and not runs_in_kitchen(codec):
        shape = codec.weight_shape(tuple(state_dict[f"{prefix}weight"].shape), config)
        parts = {suffix: state_dict.pop(prefix + suffix) for suffix in codec.specs(shape)}
        state_dict |= {prefix + suffix: make(codec, parts) for suffix, make in _EXPANDED.items()}


class ExpandedTensors(Mapping[str, torch.Tensor]):
    """The tensors of a file as ComfyUI's loaders get them: those of an expanded layer are made when they are read.

    Args:
        tensors: those of the file by name.
        codecs: {layer: codec} of the expanded layers.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor], codecs: Mapping[str, Codec]):
        self._tensors, self._codecs = tensors, codecs
        self._names = dict.fromkeys(name for name in tensors if not self._is_part(name))
        self._names |= dict.fromkeys(f"{layer}.{suffix}" for layer in codecs for suffix in _EXPANDED)

    def _is_part(self, name: str) -> bool:
        """Whether that is a tensor of an expanded layer other than its bias."""
        layer, _, suffix = name.rpartition(".")
        return layer in self._codecs and suffix != "bias"

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self._names:
            raise KeyError(name)
        if not self._is_part(name):
            return self._tensors[name]
        layer, _, suffix = name.rpartition(".")
        return _EXPANDED[suffix](cast(AsymW4A8Codec, self._codecs[layer]), layer_parts(self._tensors, layer))

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def layer_parts(tensors: Mapping[str, torch.Tensor], layer: str) -> dict[str, torch.Tensor]:
    """{suffix: tensor} of one layer of a file."""
    names = {name.rpartition(".")[2]: name for name in tensors if name.rpartition(".")[0] == layer}
    return {suffix: tensors[name] for suffix, name in names.items()}
