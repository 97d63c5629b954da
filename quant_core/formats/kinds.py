"""Which quantizations a source has, by name, and what ComfyUI makes of those that no layer JSON names."""

from dataclasses import dataclass

import torch

from .companions import PACKED_DTYPES, find_unknown_companions
from .detect import LEGACY_MARKER, UNSCALED_DTYPES, has_known_scale, legacy_markers
from .external import ExternalLayer, find_external
from .layer_json import LayerSource, layer_configs, loaded_configs
from .scaled import ScaledCodec
from .table import READABLE

__all__ = ["Kind", "can_dequantize", "find_kinds", "quantized_formats"]

_ELEMENTS = {
    entry.elements.dtype: entry.elements.name for entry in READABLE.values() if issubclass(entry.codec, ScaledCodec)
}
_NOT_LOADED = "ComfyUI does not load such layers"


@dataclass(frozen=True, order=True)
class Kind:
    """A quantization that no layer JSON names.

    Attributes:
        name: for users.
        support: what ComfyUI does with such layers, and what to do; one sentence without its full stop.
        readable: the layers can be dequantized.
        plain: the values have no scales.
        loaded: ComfyUI loads the layers as they are meant.
        foreign: the layers are in a format of another quantizer, or in an unknown one.
    """

    name: str
    support: str
    readable: bool = True
    plain: bool = False
    loaded: bool = False
    foreign: bool = False


_LEGACY = Kind(
    "scaled fp8 (old)", "Stock ComfyUI loads such layers; lrq migrate writes them in the format of today", loaded=True
)
_UNMARKED = Kind(
    "scaled fp8 (old)",
    f"ComfyUI takes such values for weights, since the tensor {LEGACY_MARKER} is missing; lrq migrate writes them in the format of today",
)
_NO_FORMAT = Kind(
    "layer JSON without a format (INT8-Fast)", f"{_NOT_LOADED}; lrq migrate writes them in the format of today"
)
_SCALES = ("weight_scale", "scale_weight")  # names of today and of older tools
_UNKNOWN = "an unknown quantization"


def find_kinds(source: LayerSource) -> dict[str, Kind]:
    """{layer: its quantization} of the layers with quantized values whose format no layer JSON names."""
    configs = loaded_configs(source)
    kinds = {layer: _NO_FORMAT for layer, config in configs.items() if config.get("format") is None}
    refused = set()
    layers: dict[str, str] = {}  # name of a tensor of an external format → its layer
    for layer in find_external(source, configs):
        kinds[layer.name] = _external_kind(source, layer)
        layers |= dict.fromkeys(layer.parts.values(), layer.name)
        if layer.format.refusal:
            refused.add(layer.name)
    marked = bool(legacy_markers(source))
    for name, info in source.tensors.items():
        layer, _, suffix = name.rpartition(".")
        if suffix != "weight" or info.dtype not in PACKED_DTYPES or layer in configs:
            continue
        if len(info.shape) == 2 or any(f"{layer}.{scale}" in source.tensors for scale in _SCALES):
            kinds.setdefault(layer, _unnamed_kind(source, layer, info.dtype, marked))
    companions = find_unknown_companions(source, configs, layers)
    for owner in companions.values():
        layer = layers.get(owner, owner.removesuffix(".weight"))
        if layer not in refused:
            kinds[layer] = _unknown_kind(next(iter(companions)))
    return kinds


def _unknown_kind(companion: str) -> Kind:
    support = (
        f"Beside quantized values are tensors of no known format, such as {companion}; use the full-precision original"
    )
    return Kind(_UNKNOWN, support, readable=False, foreign=True)


def _other_scales(name: str) -> Kind:
    support = f"{_NOT_LOADED}, and no known format has values and scales of these dtypes and shapes; use the full-precision original"
    return Kind(name, support, readable=False, foreign=True)


def _external_kind(source: LayerSource, layer: ExternalLayer) -> Kind:
    format = layer.format
    if format.refusal:
        return Kind(
            format.name,
            f"{_NOT_LOADED}, and they cannot be dequantized: {format.refusal}",
            readable=False,
            foreign=True,
        )
    if format.renamed and not has_known_scale(
        *(source.tensors[layer.parts[key]] for key in ("weight", "weight_scale"))
    ):
        return _other_scales(format.name)
    migrate = "lrq migrate writes them in ComfyUI's format, and " if format.renamed else ""
    return Kind(format.name, f"{_NOT_LOADED}; {migrate}lrq quantize --requantize dequantizes them", foreign=True)


def _unnamed_kind(source: LayerSource, layer: str, dtype: torch.dtype, marked: bool) -> Kind:
    """The quantization of a weight in a dtype of quantized values, without JSON and in no external format."""
    weight = source.tensors[f"{layer}.weight"]
    scale, old = (source.tensors.get(f"{layer}.{suffix}") for suffix in _SCALES)
    if old is not None:
        is_matrix = len(weight.shape) == 2
        return (_LEGACY if marked else _UNMARKED) if is_matrix else _other_scales(_LEGACY.name)
    name = _ELEMENTS.get(dtype, str(dtype).removeprefix("torch.").upper())
    if scale is not None and dtype in _ELEMENTS:
        without = f"{name} without layer JSON"
        if not has_known_scale(weight, scale):
            return _other_scales(without)
        support = "ComfyUI takes such values for weights, since their layer JSON is missing; lrq migrate adds it"
        return Kind(without, support)
    if dtype in UNSCALED_DTYPES:
        return Kind(
            f"plain {name} weights",
            "Stock ComfyUI loads them as plain weights, without scales",
            plain=True,
            loaded=True,
        )
    return Kind(
        f"plain {name} weights",
        "ComfyUI takes such values for weights, and their scales are missing; download the file again",
        readable=False,
        plain=True,
        foreign=dtype not in _ELEMENTS,
    )


def quantized_formats(source: LayerSource) -> list[str]:
    """Names of the quantizations that a source already has; empty for plain weights."""
    configs, header = layer_configs(source)
    found = {str(config["format"]) for config in (*configs.values(), *header.values()) if config.get("format")}
    if legacy_markers(source):
        found.add(_LEGACY.name)
    kinds = set(find_kinds(source).values())
    found |= {kind.name for kind in kinds if not kind.plain}
    return sorted(found | {kind.name for kind in kinds if kind.plain and not (found and kind.readable)})


def can_dequantize(source: LayerSource) -> bool:
    """Whether the layers whose format no layer JSON names can be dequantized."""
    return all(kind.readable for kind in find_kinds(source).values())
