"""Does a file keep the contract that ComfyUI's loader relies on? The loader itself notices little of it.

ComfyUI 0.33 samples garbage without a word when a layer lacks its ``comfy_quant``, and finds a wrong scale shape
only while sampling; hence this check.
"""

import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch

from ..errors import RecipeError
from ..formats import FORMATS, Encoding
from ..sources.opening import open_safetensors
from ..sources.source import Source, TensorInfo
from .metadata import CONFIG_SUFFIX, QUANTIZATION_KEY, header_layers, layer_configs

__all__ = ["Verification", "verify_file", "verify_source", "CODE_DTYPES", "layer_encoding"]

CODE_DTYPES = {entry.grid.dtype for entry in FORMATS.values()}

_SHAPE_KEYS = ("per_row", "group_size")  # of a layer's JSON, which repeat what its scale's shape says


@dataclass
class Verification:
    """``layers``: quantized layers found; ``problems``: one sentence each, empty when the file is sound."""

    layers: int = 0
    problems: list[str] = field(default_factory=list)


def layer_encoding(layer: str, config: Mapping[str, object], tensors: Mapping[str, TensorInfo]) -> Encoding:
    """The encoding that the layer's JSON and its scale's shape mean. Raises ValueError with one sentence when none fits."""
    format = FORMATS.get(config.get("format"))
    if format is None:
        raise ValueError(
            f"{layer}: its format '{config.get('format')}' is not one this version knows ({', '.join(FORMATS)})"
        )
    weight = tensors.get(f"{layer}.weight")
    if weight is None:
        raise ValueError(f"{layer}: has a quantization entry but no weight")
    if len(weight.shape) != 2:
        raise ValueError(f"{layer}: the weight has shape {weight.shape}; only matrices are read as quantized")
    wanted = []
    for granularity in format.granularities:
        try:
            encoding = Encoding.from_config(config, granularity)
        except RecipeError as error:
            wanted.append(str(error).rstrip("."))
            continue
        specs = {suffix: TensorInfo(*spec) for suffix, spec in encoding.specs(weight.shape).items()}
        if all(tensors.get(f"{layer}.{suffix}") == spec for suffix, spec in specs.items()):
            return encoding
        wanted.append(", ".join(f"{suffix} {spec.dtype} {spec.shape}" for suffix, spec in specs.items()))
    have = ", ".join(
        f"{suffix} " + (f"{found.dtype} {found.shape}" if (found := tensors.get(f"{layer}.{suffix}")) else "missing")
        for suffix in ("weight", "weight_scale")
    )
    raise ValueError(f"{layer}: {format.name} needs {' or '.join(wanted)}; the file has {have}")


def _layer_problems(source: Source, layer: str, config: Mapping[str, object]) -> Iterator[str]:
    try:
        encoding = layer_encoding(layer, config, source.tensors)
    except ValueError as error:
        yield f"{error}."
        return
    for key in _SHAPE_KEYS:
        if config.get(key) != encoding.config.get(key):
            yield f"{layer}: its JSON says {key}={config.get(key)} and its scale's shape says {encoding.config.get(key)}."
    if encoding.format.full_precision_matmul == "always" and not config.get("full_precision_matrix_mult"):
        yield (
            f"{layer}: its JSON lacks full_precision_matrix_mult, and no NVIDIA card multiplies {encoding.format.name} codes; "
            "lrq migrate adds it."
        )
    inner = source.tensors[f"{layer}.weight"].shape[1]
    if encoding.rotation and inner % encoding.rotation.size:
        yield f"{layer}: ConvRot groups of {encoding.rotation.size} do not divide its {inner} input channels."
    for suffix in ("weight_scale", "input_scale"):
        name = f"{layer}.{suffix}"
        if info := source.tensors.get(name):
            if not info.dtype.is_floating_point or math.prod(info.shape) != 1 and suffix == "input_scale":
                yield f"{layer}: {suffix} is {info.dtype} {info.shape}, and should be one number."
                continue
            scale = source.read(name).float()
            if not (torch.isfinite(scale) & (scale > 0)).all():
                yield f"{layer}: {suffix} holds values that are not finite and positive."


def _problems(source: Source, configs: Mapping[str, dict], header: Mapping[str, dict]) -> Iterator[str]:
    for layer, config in (configs or header).items():
        yield from _layer_problems(source, layer, config)
    expected = header_layers(configs)
    if configs and not header:
        yield f"The header has no {QUANTIZATION_KEY}, so older ComfyUI releases cannot read the file."
    for layer in sorted(expected.keys() | header.keys()) if header else ():
        if expected.get(layer) != header.get(layer):
            yield f"{layer}: the header says {header.get(layer)} and the {CONFIG_SUFFIX[1:]} tensor says {expected.get(layer)}."
    for name, info in source.tensors.items():
        layer, _, suffix = name.rpartition(".")
        if layer not in configs and layer not in header:
            if suffix == "weight" and info.dtype in CODE_DTYPES:
                yield f"{layer}: holds codes ({info.dtype}) but no {CONFIG_SUFFIX[1:]} tensor, so ComfyUI would use them as weights."
            elif suffix == "weight_scale":
                yield f"{layer}: has a weight_scale but no {CONFIG_SUFFIX[1:]} tensor."


def verify_source(source: Source) -> Verification:
    """Check tensors that are or would be a file, layer by layer; weights are not read."""
    configs, header = layer_configs(source)
    return Verification(len(configs or header), list(_problems(source, configs, header)))


def verify_file(path: str | os.PathLike) -> Verification:
    """Check a safetensors file, or shards by their index or folder, layer by layer; weights are not read.

    Raises SourceError when it cannot be read at all.
    """
    with open_safetensors(path) as source:
        return verify_source(source)
