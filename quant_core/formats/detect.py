"""What a layer is in a file: the one place that maps names, dtypes and shapes of tensors to a codec.

:func:`detect_layer` takes a layer at its JSON's word and checks the tensors against it. :func:`detect_layers` finds all
quantized layers of a source, those of older tools with wrong or no JSON included.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch

from ..errors import RecipeError, SourceError
from .codec import Codec, Format, Parts
from .companions import find_unknown_companions
from .expert_bank import count_experts, describe_matrix, expert_parts, find_parts
from .external import ExternalFormat, find_external
from .layer_json import CONFIG_KEY, LayerSource, loaded_configs
from .scaled import ScaledCodec
from .table import READABLE

__all__ = [
    "LEGACY_MARKER",
    "QUANTIZED_DTYPES",
    "UNSCALED_DTYPES",
    "StoredLayer",
    "check_companions",
    "detect_layer",
    "detect_layers",
    "has_known_scale",
    "is_scale",
    "legacy_markers",
    "orphan_problem",
    "read_scale",
]

_SCALED = {name: entry for name, entry in READABLE.items() if issubclass(entry.codec, ScaledCodec)}
QUANTIZED_DTYPES = {entry.elements.dtype for entry in _SCALED.values()}
UNSCALED_DTYPES = {dtype for dtype in QUANTIZED_DTYPES if dtype.is_floating_point}  # weights even without a scale
LEGACY_MARKER = "scaled_fp8"  # tensor by which scaled FP8 was marked before ComfyUI had layer JSON
# Suffix of a tensor → that of the same tensor today.
_TODAY = {
    "weight_scale": "weight_scale",
    "scale_weight": "weight_scale",
    "input_scale": "input_scale",
    "scale_input": "input_scale",
    CONFIG_KEY: CONFIG_KEY,
}
_BLOCK_SIZES = [2**power for power in range(10, 2, -1)]
_REMAKE = "make the file again from its full-precision original"


def detect_layer(layer: str, config: Mapping[str, object], tensors: Mapping) -> Codec:
    """The codec of a layer whose JSON is ``config``, or of the matrices of a bank of experts, checked against its tensors.

    Args:
        layer: base name of the layer.
        tensors: tensor name → anything with ``dtype`` and ``shape``; other layers' may be among them.

    Raises:
        ValueError: the tensors are not those of the format; the message is one sentence without its full stop.
    """
    if config.get("format") is None:
        raise ValueError(f"{layer}: its JSON names no format; run lrq migrate, which adds it")
    format = READABLE.get(str(config["format"]))
    if format is None:
        raise ValueError(f"{layer}: format '{config['format']}' is not known to this version ({', '.join(READABLE)})")
    experts = count_experts(layer, config, tensors)
    find = find_parts(layer, tensors, experts)
    weight = find("weight")
    if weight is None:
        raise ValueError(f"{layer}: has a quantization entry and no weight")
    expected, problems, suffixes = [], [], ["weight"]
    for granularity in format.granularities:
        try:
            codec = format.codec.from_config(format, config, granularity)
            codec = codec.of_tensors(find)
            specs = codec.specs(codec.weight_shape(weight.shape, config))
        except (RecipeError, ValueError) as error:
            problems.append(str(error).rstrip("."))
            continue
        if all(spec.matches(find(suffix)) for suffix, spec in specs.items()):
            if experts and (reason := codec.admits_bank()):
                raise ValueError(f"{layer}: {reason}")
            return codec
        suffixes = list(specs)
        expected.append(", ".join(f"{suffix} {spec.dtype} {spec.shape}" for suffix, spec in specs.items()))
    if not expected:
        raise ValueError(f"{layer}: {problems[0]}")
    found = ", ".join(f"{suffix} {_describe(find(suffix))}" for suffix in suffixes)
    each = f" for each of {experts} experts" if experts else ""
    raise ValueError(f"{layer}: {format.name} needs {' or '.join(expected)}{each}; the file has {found}")


def _describe(found) -> str:
    return "missing" if found is None else f"{found.dtype} {tuple(found.shape)}"


@dataclass(frozen=True)
class StoredLayer:
    """A quantized layer as it is in a file.

    Attributes:
        name: its base name.
        config: its JSON as ComfyUI reads it; empty where there is none.
        parts: suffix of today → name of the tensor, the weight included where it holds quantized values.
        codec: how the tensors are stored, whatever the JSON calls it; None where one is missing or the format is unknown.
        shape: (out, in) of the weight, or (experts, out, in) of a bank; empty where the layer cannot be dequantized.
        problem: why a layer in a known format cannot be dequantized, one sentence; empty where it can.
        external: the format of another quantizer that it is in, None for ours. It may have a decoder in place of a codec.
    """

    name: str
    config: dict
    parts: dict[str, str] = field(default_factory=dict)
    codec: Codec | None = None
    shape: tuple[int, ...] = ()
    problem: str = ""
    external: ExternalFormat | None = None

    @property
    def relabelled(self) -> bool:
        """The JSON follows from the tensors; that of other formats is left as it is."""
        if self.external is not None:
            return self.external.renamed
        return self.config.get("format") is None or self.config["format"] in _SCALED

    @property
    def format_name(self) -> str:
        """Name of the format, or of the external one."""
        return self.external.name if self.external else str(self.config.get("format"))

    @property
    def kind(self) -> str:
        """The codec for users, with the external format that it was found in."""
        if self.codec is None or self.external is None:
            return str(self.codec or self.format_name)
        return f"{self.codec} ({self.external.name})"

    @property
    def needed(self) -> set[str]:
        """Suffixes of the tensors beside the weight that its values depend on."""
        if self.codec is None:
            return set(self.parts) - {"weight"} if self.external else set()
        optional = set() if self.relabelled or self.is_bank else set(self.codec.optional(self.shape))
        return (set(self.codec.specs(self.shape[-2:])) | optional) - {"weight"}

    @property
    def is_bank(self) -> bool:
        """Whether it is a bank of experts."""
        return len(self.shape) == 3

    def dequantize(self, qdata: torch.Tensor, others: Parts, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The weight in ``dtype``, computed in float32; ``others``: the layer's tensors by suffix, without its weight.

        The float32 values of one expert of a bank are in memory at a time.
        """
        parts = {"weight": qdata, **others}
        if self.external is not None and self.external.decode is not None:
            return self.external.decode(parts, self.shape).to(dtype)
        assert self.codec is not None
        if not self.is_bank:
            return self.codec.dequantize(parts, self.shape).to(dtype)
        weights = torch.empty(self.shape, dtype=dtype, device=qdata.device)
        for expert, weight in enumerate(weights):
            weight.copy_(self.codec.dequantize(expert_parts(parts, expert), self.shape[1:]))
        return weights

    def read_scale(self, source: LayerSource, suffix: str) -> torch.Tensor:
        """A scale of the layer as float32. Raises SourceError unless it is finite and positive."""
        divisor = self.external.scale_divisor if self.external and suffix == "weight_scale" else 1.0
        return read_scale(source, self.parts[suffix]) / divisor


def detect_layers(source: LayerSource) -> Iterator[StoredLayer]:
    """Every quantized layer of a source, and every layer with a tensor that only quantized layers have.

    Raises:
        SourceError: tensors that match no format, or two names of one tensor.
    """
    configs = loaded_configs(source)
    markers = {
        name.removesuffix(LEGACY_MARKER): source.tensors[name].shape == (2,)
        for name in sorted(legacy_markers(source), key=len, reverse=True)
    }
    found = _layer_tensors(source)
    external = {layer.name: layer for layer in find_external(source, configs)}
    for name, config in configs.items():
        if not StoredLayer(name, config).relabelled and f"{name}.weight" in source.tensors:
            found.setdefault(name, {})
    for name, parts in found.items():
        if name in external:
            _check_one_scale(source, parts, external[name].parts)
            continue
        config = configs.get(name, {})
        layer = StoredLayer(name, config, parts)
        if not layer.relabelled:
            yield _detect_declared(source, layer)
        elif {"weight", "weight_scale"} <= parts.keys():
            # ComfyUI's legacy marker requests full-precision products for the layers below its own prefix.
            marked = next((full for prefix, full in markers.items() if name.startswith(prefix)), False)
            codec = _detect_scaled(source, layer, bool(config.get("full_precision_matrix_mult", marked)))
            weight = source.tensors[parts["weight"]]
            yield StoredLayer(name, config, parts, codec, tuple(weight.shape))
        else:
            yield layer
    for layer in external.values():
        yield _detect_external(source, StoredLayer(layer.name, {}, dict(layer.parts), external=layer.format))


def _detect_external(source: LayerSource, layer: StoredLayer) -> StoredLayer:
    """The layer of an external format, with codec or shape where it can be dequantized, else with the problem."""
    format = layer.external
    assert format is not None
    where = f"{source.name}: {layer.name} is in format {format.name}"
    if format.refusal:
        return replace(layer, problem=f"{where}, whose values cannot be dequantized: {format.refusal}.")
    if format.renamed:
        codec = _detect_scaled(source, layer, False)
        return replace(layer, codec=codec, shape=tuple(source.tensors[layer.parts["weight"]].shape))
    assert format.read_shape is not None
    try:
        return replace(layer, shape=format.read_shape(source, layer.parts))
    except ValueError as error:
        return replace(layer, problem=f"{where} and not valid: {error}; download the file again.")


def is_scale(suffix: str) -> bool:
    """Whether that is the last part of the name of a weight's scale in a file of today."""
    return suffix == "weight_scale"


def legacy_markers(source: LayerSource) -> list[str]:
    """Names of the tensors that mark scaled FP8 of older tools."""
    return [name for name in source.tensors if name.rpartition(".")[2] == LEGACY_MARKER]


def _layer_tensors(source: LayerSource) -> dict[str, dict[str, str]]:
    """{layer: {suffix of today: tensor name}} of layers with a tensor beside the weight that quantized layers have."""
    found: dict[str, dict[str, str]] = {}
    for name in source.tensors:
        layer, _, suffix = name.rpartition(".")
        if suffix in _TODAY:
            other = found.setdefault(layer, {}).setdefault(_TODAY[suffix], name)
            if other != name:
                raise _two_names(source, other, name)
    for layer, parts in found.items():
        weight = source.tensors.get(f"{layer}.weight")
        if weight is not None and weight.dtype in QUANTIZED_DTYPES:
            parts["weight"] = f"{layer}.weight"
    return found


def _check_one_scale(source: LayerSource, parts: Mapping[str, str], external: Mapping[str, str]) -> None:
    """Raise SourceError where a layer of an external format also has the scale of a ComfyUI format."""
    ours, theirs = parts.get("weight_scale"), external.get("weight_scale")
    if ours and theirs and ours != theirs:
        raise _two_names(source, theirs, ours)


def _two_names(source: LayerSource, one: str, other: str) -> SourceError:
    return SourceError(
        f"{source.name}: {one} and {other} are two names of one tensor, so its value is ambiguous; {_REMAKE}."
    )


def _detect_declared(source: LayerSource, layer: StoredLayer) -> StoredLayer:
    """The layer of a format whose JSON names it; without a codec where the format is unknown or the layer is not valid."""
    format, weight = READABLE.get(layer.config["format"]), source.tensors.get(f"{layer.name}.weight")
    if format is None or weight is None:
        return layer
    where = f"{source.name}: {layer.name} is not a valid layer of format {format.name}"
    experts = count_experts(layer.name, layer.config, source.tensors)
    bank = (experts,) if experts else ()
    try:
        codec = format.codec.from_config(format, layer.config, next(iter(format.granularities)))
        codec = codec.of_tensors(find_parts(layer.name, source.tensors, experts))
        matrix = codec.weight_shape(tuple(weight.shape)[len(bank) :], layer.config)
    except (RecipeError, ValueError) as error:
        return replace(layer, problem=f"{where}: {str(error).rstrip('.')}.")
    required = codec.specs(matrix)
    optional = () if bank else codec.optional(matrix)
    names = {suffix: f"{layer.name}.{suffix}" for suffix in (*required, *optional, CONFIG_KEY)}
    parts = {suffix: name for suffix, name in names.items() if name in source.tensors}
    if missing := [suffix for suffix in required if suffix not in parts]:
        return replace(layer, problem=f"{where}: its {missing[0]} is missing; download the file again.")
    return replace(layer, parts=parts, codec=codec, shape=(*bank, *matrix))


def _detect_scaled(source: LayerSource, layer: StoredLayer, full_precision: bool) -> Codec:
    """The codec of quantized values and one scale tensor, from their dtypes and shapes. Raises SourceError where none fits."""
    experts = count_experts(layer.name, layer.config, source.tensors)
    weight, scale = (
        describe_matrix(source.tensors[layer.parts[suffix]], experts) for suffix in ("weight", "weight_scale")
    )
    if not (scale.dtype.is_floating_point or scale.dtype.is_complex):
        raise SourceError(f"{layer.name}: its scale is {scale.dtype}, and must be of floating point; {_REMAKE}.")
    granularity, block_size = _granularity(weight.shape, scale.shape)
    format = _find_scaled(weight.dtype, granularity)
    if format is None or granularity is None:
        raise SourceError(
            f"{layer.name}: quantized values {weight.dtype} {weight.shape} with a scale of shape {scale.shape} match none of the formats "
            f"{', '.join(_SCALED)}; {_REMAKE}."
        )
    declared = layer.config.get("group_size")
    if granularity == "block" and declared != block_size and _counts(weight.shape, declared) == tuple(scale.shape):
        raise SourceError(f"{layer.name}: blocks of {declared}, as in its JSON, match none of the formats; {_REMAKE}.")
    rotated = bool(layer.config.get("convrot")) and weight.dtype is torch.int8
    if rotated and granularity not in format.rotated:
        raise SourceError(
            f"{layer.name}: rotated values (ConvRot) with one scale per {granularity} match none of the formats; {_REMAKE}."
        )
    return format.make(
        granularity,
        block_size=block_size,
        convrot=layer.config.get("convrot_groupsize", 256) if rotated else None,
        full_precision_matmul=full_precision and format.full_precision_matmul != "never",
    )


def has_known_scale(weight, scale) -> bool:
    """Whether a format here has quantized values and one scale tensor of these dtypes and shapes."""
    return scale.dtype.is_floating_point and bool(
        _find_scaled(weight.dtype, _granularity(weight.shape, scale.shape)[0])
    )


def _find_scaled(dtype: torch.dtype, granularity: str | None) -> Format | None:
    """The format with one level of scales that has elements of that dtype and that granularity, if there is one."""
    return next(
        (entry for entry in _SCALED.values() if entry.elements.dtype is dtype and granularity in entry.granularities),
        None,
    )


def _granularity(weight: tuple[int, ...], scale: tuple[int, ...]) -> tuple[str | None, int | None]:
    """(granularity, side of a block) of a scale of that shape; (None, None) where there is none."""
    if len(weight) != 2:
        return None, None
    if all(side == 1 for side in scale):
        return "tensor", None
    if tuple(scale) in ((weight[0],), (weight[0], 1)):
        return "row", None
    size = next((size for size in _BLOCK_SIZES if _counts(weight, size) == tuple(scale)), None)
    return ("block", size) if size else (None, None)


def _counts(weight: tuple[int, ...], size: object) -> tuple[int, ...] | None:
    """Shape of the scales of a weight in blocks of that side; None where ``size`` is not one."""
    return tuple(-(-side // size) for side in weight) if type(size) is int and size > 0 else None


def orphan_problem(source: LayerSource, layer: StoredLayer) -> str | None:
    """Why a scale without quantized values cannot be ignored; None where it can: it is 1, or there is no weight."""
    weight = source.tensors.get(f"{layer.name}.weight")
    if (
        "weight_scale" not in layer.parts
        or weight is None
        or bool((source.read(layer.parts["weight_scale"]).float() == 1).all())
    ):
        return None
    return (
        f"{source.name}: {layer.parts['weight_scale']} is the scale of an unquantized weight ({weight.dtype}), so the values are "
        f"ambiguous; {_REMAKE}."
    )


def read_scale(source: LayerSource, name: str) -> torch.Tensor:
    """A scale as float32. Raises SourceError unless it is finite and positive; some, not all, of its values may be 0, of zeros."""
    scale = source.read(name)
    if not scale.is_complex():
        scale = scale.float()
    if scale.is_complex() or not (scale.any() and (torch.isfinite(scale) & (scale >= 0)).all()):
        raise SourceError(f"{source.name}: {name} has values that are not finite and positive; {_REMAKE}.")
    return scale


def check_companions(source: LayerSource, layers: Iterable[StoredLayer]) -> None:
    """Raise SourceError for a tensor that changes what the quantized values of one of the layers mean, in an unknown way."""
    parts = {name for layer in layers if layer.shape for name in layer.parts.values()}
    for name, owner in find_unknown_companions(source, loaded_configs(source), parts).items():
        raise SourceError(
            f"{source.name}: {name} belongs to the quantized values of {owner}, and no known format has it; give the "
            "full-precision original."
        )
