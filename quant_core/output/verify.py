"""Check a file against the contract that ComfyUI's loader relies on; the loader itself checks little of it.

ComfyUI 0.33 samples noise without an error when a layer lacks its JSON, and finds a wrong scale shape only while it
samples.
"""

import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch

from ..formats import Codec, StoredLayer, detect_layer
from ..formats.detect import QUANTIZED_DTYPES, is_scale
from ..formats.layer_json import CONFIG_KEY, QUANTIZATION_KEY, header_layers, layer_configs
from ..sources import Source, open_safetensors

__all__ = ["Verification", "verify_file", "verify_source"]

_SHAPE_KEYS = ("per_row", "group_size")  # of a layer's JSON, which repeat what the shape of its scale implies


@dataclass
class Verification:
    """``layers``: number of quantized layers; ``problems``: one sentence each, empty when the file is valid."""

    layers: int = 0
    problems: list[str] = field(default_factory=list)


def verify_file(path: str | os.PathLike) -> Verification:
    """Check a safetensors file, or shards by their index, folder or one of them, layer by layer; weights are not read.

    Raises:
        SourceError: the file cannot be read at all.
    """
    with open_safetensors(path) as source:
        return verify_source(source)


def verify_source(source: Source) -> Verification:
    """Check tensors that are, or are to become, a file; weights are not read."""
    configs, header = layer_configs(source)
    return Verification(len(configs or header), list(_problems(source, configs, header)))


def _problems(source: Source, configs: Mapping[str, dict], header: Mapping[str, dict]) -> Iterator[str]:
    for layer, config in (configs or header).items():
        yield from _layer_problems(source, layer, config)
    expected = header_layers(configs)
    if configs and not header:
        yield f"The header has no {QUANTIZATION_KEY}, so ComfyUI before 0.27 cannot read the file."
    for layer in sorted(expected.keys() | header.keys()) if header else ():
        if expected.get(layer) != header.get(layer):
            yield (
                f"{layer}: its JSON is {header.get(layer)} in the header and {expected.get(layer)} in the {CONFIG_KEY} tensor."
            )
    for name, info in source.tensors.items():
        layer, _, suffix = name.rpartition(".")
        if layer in configs or layer in header:
            continue
        if suffix == "weight" and info.dtype in QUANTIZED_DTYPES:
            yield f"{layer}: has quantized values ({info.dtype}) and no {CONFIG_KEY} tensor, so ComfyUI would use them as weights."
        elif is_scale(suffix):
            yield f"{layer}: has a {suffix} and no {CONFIG_KEY} tensor."


def _layer_problems(source: Source, layer: str, config: Mapping[str, object]) -> Iterator[str]:
    try:
        codec = detect_layer(layer, config, source.tensors)
    except ValueError as error:
        yield f"{error}."
        return
    exact = StoredLayer(layer, dict(config)).relabelled  # other formats need no keys that ComfyUI does not read
    for key in _SHAPE_KEYS:
        if (exact or key in config) and config.get(key) != codec.config.get(key):
            yield f"{layer}: its JSON has {key}={config.get(key)}, and the shape of its scale implies {codec.config.get(key)}."
    if codec.format.full_precision_matmul == "always" and not config.get("full_precision_matrix_mult"):
        yield (
            f"{layer}: its JSON lacks full_precision_matrix_mult, and no NVIDIA card multiplies {codec.format.name}; "
            "lrq migrate adds it."
        )
    shape = codec.weight_shape(tuple(source.tensors[f"{layer}.weight"].shape), config)
    if reason := codec.admits(shape):
        yield f"{layer}: {reason}."
    yield from _value_problems(source, layer, codec, shape)


def _value_problems(source: Source, layer: str, codec: Codec, shape: tuple[int, int]) -> Iterator[str]:
    """Scales that are not finite, or not positive where they must be."""
    for suffix, spec in {**codec.specs(shape), **codec.optional(shape)}.items():
        info = source.tensors.get(f"{layer}.{suffix}")
        if suffix == "weight" or info is None or not spec.dtype.is_floating_point:
            continue
        if not info.dtype.is_floating_point and info.dtype not in spec.views:
            yield f"{layer}: {suffix} is {info.dtype} {info.shape}, and must be {spec.dtype} {spec.shape}."
            continue
        if suffix in codec.optional(shape) and math.prod(info.shape) != math.prod(spec.shape):
            yield f"{layer}: {suffix} is {info.dtype} {info.shape}, and must be {spec.dtype} {spec.shape}."
            continue
        values = source.read(f"{layer}.{suffix}")
        values = (values.view(spec.dtype) if not info.dtype.is_floating_point else values).float()
        if not torch.isfinite(values).all() or suffix in codec.positive and not (values > 0).all():
            yield f"{layer}: {suffix} has values that are not finite{' and positive' if suffix in codec.positive else ''}."
