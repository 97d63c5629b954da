"""Does a file keep the contract that ComfyUI's loader relies on? The loader itself notices little of it.

ComfyUI 0.33 samples garbage without a word when a layer lacks its ``comfy_quant``, and finds a wrong scale shape
only while sampling; hence this check.
"""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch

from ..formats import FORMATS
from .metadata import CONFIG_SUFFIX, QUANTIZATION_KEY, header_layers, layer_configs
from .reader import SafetensorsFile
from .source import Source, TensorInfo

__all__ = ["Verification", "verify_file", "CODE_DTYPES", "layer_granularity"]

CODE_DTYPES = {entry.grid.dtype for entry in FORMATS.values()} | {torch.float8_e5m2}


@dataclass
class Verification:
    """``layers``: quantized layers found; ``problems``: one sentence each, empty when the file is sound."""

    layers: int = 0
    problems: list[str] = field(default_factory=list)


def layer_granularity(layer: str, config: Mapping[str, object], tensors: Mapping[str, TensorInfo]) -> str:
    """The granularity that the layer's scale shape means. Raises ValueError with one sentence when nothing fits."""
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
        specs = {
            f"{layer}.{suffix}": TensorInfo(*spec) for suffix, spec in format.specs(granularity, weight.shape).items()
        }
        if all(tensors.get(name) == spec for name, spec in specs.items()):
            return granularity
        wanted.append(
            ", ".join(f"{name.removeprefix(layer + '.')} {spec.dtype} {spec.shape}" for name, spec in specs.items())
        )
    have = ", ".join(
        f"{suffix} "
        + (
            f"{tensors[f'{layer}.{suffix}'].dtype} {tensors[f'{layer}.{suffix}'].shape}"
            if f"{layer}.{suffix}" in tensors
            else "missing"
        )
        for suffix in format.specs(next(iter(format.granularities)), weight.shape)
    )
    raise ValueError(f"{layer}: {format.name} needs {' or '.join(wanted)}; the file has {have}")


def _layer_problems(source: Source, layer: str, config: Mapping[str, object]) -> Iterator[str]:
    try:
        granularity = layer_granularity(layer, config, source.tensors)
    except ValueError as error:
        yield f"{error}."
        return
    expected = FORMATS[config["format"]].granularities[granularity]
    for key in {key for extra in FORMATS[config["format"]].granularities.values() for key in extra}:
        if config.get(key) != expected.get(key):
            yield f"{layer}: its JSON says {key}={config.get(key)} and its scale's shape says {expected.get(key)}."
    for suffix in ("weight_scale", "input_scale"):
        name = f"{layer}.{suffix}"
        if name in source.tensors:
            scale = source.read(name)
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


def verify_file(path: str | os.PathLike) -> Verification:
    """Check a safetensors file layer by layer; weights are not read. Raises SourceError when it cannot be read at all."""
    with SafetensorsFile(path) as source:
        configs, header = layer_configs(source)
        return Verification(len(configs or header), list(_problems(source, configs, header)))
