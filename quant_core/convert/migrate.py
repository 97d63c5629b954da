"""Quantized files that ComfyUI misreads, or reads by its old rules only, into its own format of today; codes stay as they are.

What changes is how codes are labelled: old scaled FP8 (``scaled_fp8``, ``scale_weight``, ``scale_input``), scales of rows or
blocks under the name of a format per tensor, layers without their JSON, scales that belong to nothing, input scales. FP8 without a
scale becomes the plain weights that ComfyUI takes it for.
"""

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch

from ..calibration import Calibration, input_scale
from ..errors import NothingToQuantizeError, OutputExistsError, SourceError
from ..formats import FORMATS, ROTATED, Encoding, make_encoding
from ..formats.weight import config_tensor
from ..output import (
    QUANTIZATION_KEY,
    SafetensorsWriter,
    final_path,
    header_bytes,
    keep_apart,
    layer_configs,
    loading_note,
    quantization_metadata,
    remove_leftovers,
)
from ..output.verify import verify_source
from ..sources import Source, TensorInfo, TensorSource, open_safetensors

__all__ = [
    "PLAIN",
    "UNSCALED",
    "CodedLayer",
    "Migration",
    "coded_layers",
    "foreign_layers",
    "migrate_file",
    "old_marks",
    "read_scale",
]

_MARK = "scaled_fp8"
# Suffix of a tensor beside a layer's weight → that of the same tensor today.
_TODAY = {
    "weight_scale": "weight_scale",
    "scale_weight": "weight_scale",
    "input_scale": "input_scale",
    "scale_input": "input_scale",
    "comfy_quant": "comfy_quant",
}
_CODES = {entry.grid.dtype for entry in FORMATS.values()}
UNSCALED = {dtype for dtype in _CODES if dtype.is_floating_point}  # codes that are numbers without a scale too
PLAIN = torch.bfloat16  # holds every number of FP8, and as much as eight bits say
_BLOCK_SIZES = [2**power for power in range(10, 2, -1)]


@dataclass
class Migration:
    """What was done.

    Attributes:
        layers: how many layers each encoding has in the new file.
        changes: sentence → how many layers or tensors it is true of.
        removed: names of tensors that belonged to no quantized layer.
    """

    layers: Counter = field(default_factory=Counter)
    changes: Counter = field(default_factory=Counter)
    removed: list[str] = field(default_factory=list)


def _beside(source: Source) -> dict[str, dict[str, str]]:
    """{layer: {suffix of today: tensor name}} of everything that may belong to a quantized layer, its weight included.

    Raises SourceError where a layer has the same twice, by its name of today and by an old one.
    """
    found: dict[str, dict[str, str]] = {}
    for name in source.tensors:
        layer, _, suffix = name.rpartition(".")
        if suffix in _TODAY:
            other = found.setdefault(layer, {}).setdefault(_TODAY[suffix], name)
            if other != name:
                raise SourceError(
                    f"{source.name}: {other} and {name} are two names of one thing, so what was meant is not known; make the file again from its "
                    "full-precision original."
                )
    for layer, tensors in found.items():
        if (weight := source.tensors.get(f"{layer}.weight")) and weight.dtype in _CODES:
            tensors["weight"] = f"{layer}.weight"
    return found


def _granularity(weight: TensorInfo, scale: TensorInfo) -> tuple[str, int | None] | None:
    """What shares a scale of that shape, and the side of a block; None when that is none of the ways there are."""
    out, _ = weight.shape
    count = 1
    for side in scale.shape:
        count *= side
    if count == 1:
        return "tensor", None
    if scale.shape in ((out,), (out, 1)):
        return "row", None
    return next((("block", size) for size in _BLOCK_SIZES if _counts(weight, size) == scale.shape), None)


def _counts(weight: TensorInfo, size: int) -> tuple[int, ...]:
    """Shape of the scales of a weight in blocks of that side."""
    return tuple(-(-side // size) for side in weight.shape)


def _encoding(layer: str, weight: TensorInfo, scale: TensorInfo, config: Mapping, full_precision: bool) -> Encoding:
    """How the layer's codes and scale really stand. Raises SourceError when no format is like that."""
    known = _granularity(weight, scale) if len(weight.shape) == 2 else None
    format = known and next(
        (entry for entry in FORMATS.values() if entry.grid.dtype is weight.dtype and known[0] in entry.granularities),
        None,
    )
    if not format:
        raise SourceError(
            f"{layer}: codes {weight.dtype} {weight.shape} with a scale {scale.shape} are none of the formats {', '.join(FORMATS)}; "
            "make the file again from its full-precision original."
        )
    given = config.get("group_size")
    if (
        known[0] == "block"
        and given != known[1]
        and type(given) is int
        and given > 0
        and _counts(weight, given) == scale.shape
    ):
        raise SourceError(
            f"{layer}: blocks of {given}, as its JSON says, are none of the formats; make the file again from its full-precision original."
        )
    rotated = config.get("convrot") and weight.dtype is torch.int8
    if rotated and (format.name, known[0]) not in ROTATED:
        raise SourceError(
            f"{layer}: rotated codes (ConvRot) with one scale per {known[0]} are none of the formats; "
            "make the file again from its full-precision original."
        )
    return make_encoding(
        format.name,
        known[0],
        block_size=known[1],
        convrot=config.get("convrot_groupsize", 256) if rotated else None,
        full_precision_matmul=full_precision and format.full_precision_matmul != "never",
    )


def migrate_file(
    source: str | os.PathLike,
    destination: str | os.PathLike,
    *,
    calibration: Calibration | None = None,
    drop_input_scale: bool = False,
    overwrite: bool = False,
) -> Migration:
    """Write the quantized file ``source``, or its shards, as ComfyUI's format of today; a tensor at a time, nothing until it is complete.

    Args:
        calibration: gives FP8 layers per tensor a measured ``input_scale``, in place of what they have.
        drop_input_scale: leave every input scale out. One that equals the weight's scale is a copy that clips inputs, and
            is left out anyway, as is 1.

    Raises:
        NothingToQuantizeError: the source holds no quantized layer.
        SourceError: a layer is in no known format, or would not be sound afterwards.
        OutputError: the output cannot be written, exists (without ``overwrite``) or is the source or the calibration.
    """
    destination = final_path(destination)
    with open_safetensors(source) as opened:
        keep_apart(destination, {"source": opened.paths, "calibration": getattr(calibration, "paths", ())})
        if destination.exists() and not overwrite:
            raise OutputExistsError(f"{destination} exists; choose another output or overwrite it.")
        done = Migration()
        configs, others, small = _sort(opened, calibration, drop_input_scale, done)
        plain = _unscaled(opened, others, configs)
        if plain:
            done.changes["tensors of FP8 without a scale decoded, which ComfyUI takes for plain weights"] = len(plain)
        metadata = {key: value for key, value in opened.metadata.items() if key != QUANTIZATION_KEY}
        metadata |= {QUANTIZATION_KEY: quantization_metadata(configs), **loading_note(configs)}
        infos = {
            name: replace(opened.tensors[name], dtype=PLAIN) if name in plain else opened.tensors[name]
            for name in others
        }
        infos |= {name: TensorInfo(tensor.dtype, tuple(tensor.shape)) for name, tensor in small.items()}
        _check_sound(opened.name, configs, infos, small)
        with SafetensorsWriter(destination, header_bytes(infos.items(), metadata), overwrite=overwrite) as writer:
            for name in others:
                values = opened.read(name)
                writer.add(name, values.to(PLAIN) if name in plain else values)
            for name, tensor in small.items():
                writer.add(name, tensor)
            writer.finish(metadata)
    remove_leftovers(destination)
    return done


def _check_sound(
    name: str, configs: Mapping[str, dict], infos: Mapping[str, TensorInfo], small: Mapping[str, torch.Tensor]
) -> None:
    """The file that would be written passes ``lrq verify``, layers in formats of others left aside."""
    others = {layer for layer, config in configs.items() if _foreign(config)}
    ours = {layer: config for layer, config in configs.items() if layer not in others}
    read = {tensor: values for tensor, values in small.items() if tensor.rpartition(".")[0] not in others}
    made = TensorSource(read, {QUANTIZATION_KEY: quantization_metadata(ours)}, name)
    made.tensors |= {tensor: info for tensor, info in infos.items() if tensor.rpartition(".")[0] not in others}
    if problems := verify_source(made).problems:
        raise SourceError(f"{name} would not become a sound file: {problems[0]}")


@dataclass(frozen=True)
class CodedLayer:
    """A layer as a quantized file has it.

    Attributes:
        name: its base name.
        found: suffix of today → name of the tensor, of everything that stands beside the weight, and of the weight if it holds codes.
        config: its JSON, empty when it has none.
        encoding: how codes and scale really stand; None where one of the two is missing, or the format is not one of ours.
    """

    name: str
    found: dict[str, str]
    config: dict
    encoding: Encoding | None

    @property
    def foreign(self) -> bool:
        """In a format that this version does not know."""
        return _foreign(self.config)


def foreign_layers(source: Source) -> dict[str, dict]:
    """{layer: JSON} of those in formats that are not ours, as far as their weights are there."""
    return {
        layer: config
        for layer, config in _loaded_configs(source).items()
        if _foreign(config) and f"{layer}.weight" in source.tensors
    }


def _loaded_configs(source: Source) -> dict[str, dict]:
    """The layers' JSON as ComfyUI takes it: it writes the header's over the tensors."""
    tensors, header = layer_configs(source)
    return {**tensors, **header}


def _foreign(config: Mapping) -> bool:
    return config.get("format") is not None and config["format"] not in FORMATS


def old_marks(source: Source) -> list[str]:
    """Names of the tensors by which scaled FP8 used to be known."""
    return [name for name in source.tensors if name.rpartition(".")[2] == _MARK]


def coded_layers(source: Source) -> Iterator[CodedLayer]:
    """Every layer of a quantized file, labelled rightly or not.

    Raises SourceError when one is in no known format, or a scale belongs to a weight that holds no codes.
    """
    given = _loaded_configs(source)
    # ComfyUI's old sign for it, of the layers whose names begin as the mark's does
    marks = {
        name.removesuffix(_MARK): source.tensors[name].shape == (2,)
        for name in sorted(old_marks(source), key=len, reverse=True)
    }
    for name, found in _beside(source).items():
        layer = CodedLayer(name, found, given.get(name, {}), None)
        if not layer.foreign and {"weight", "weight_scale"} <= found.keys():
            infos = (source.tensors[found[suffix]] for suffix in ("weight", "weight_scale"))
            marked = next((full for start, full in marks.items() if name.startswith(start)), False)
            full = bool(layer.config.get("full_precision_matrix_mult", marked))
            layer = replace(layer, encoding=_encoding(name, *infos, layer.config, full))
        elif not layer.foreign:
            _check_orphan(source, name, found)
        yield layer


def _sort(opened, calibration, drop_input_scale: bool, done: Migration):
    """The new file: {layer: JSON}, names of tensors that are copied, and new small tensors by name."""
    marks = old_marks(opened)
    configs, small, gone = {}, {}, set(marks)
    if marks:
        done.changes["old scaled FP8 marker replaced"] = len(marks)
    tensors, header = layer_configs(opened)
    disputed = {layer for layer, config in tensors.items() if config != header.get(layer, config)}
    if disputed:
        done.changes["layers whose comfy_quant tensor said otherwise than the header, which ComfyUI goes by"] = len(
            disputed
        )
    for entry in coded_layers(opened):
        layer, found, config, encoding = entry.name, entry.found, entry.config, entry.encoding
        if entry.foreign:
            configs[layer] = config  # MXFP8, NVFP4 …: not ours to judge
            if layer in disputed:
                gone.add(found["comfy_quant"])
                small[found["comfy_quant"]] = config_tensor(config)
            continue
        gone.update(name for suffix, name in found.items() if suffix != "weight")
        if encoding is None:
            orphans = [name for suffix, name in found.items() if suffix != "weight"]
            done.changes["tensors that belong to no quantized layer removed"] += len(orphans)
            done.removed += orphans
            continue
        configs[layer] = encoding.config
        done.layers[str(encoding)] += 1
        if encoding.config != config:
            before = config.get("format", "by no JSON")
            now = encoding.format.name
            done.changes[
                f"layers labelled {now}, before {before}" if now != before else f"{now} layers whose JSON was put right"
            ] += 1
        shape = encoding.scale_shape(opened.tensors[found["weight"]].shape)
        scale = read_scale(opened, found["weight_scale"]).reshape(shape)
        small[f"{layer}.weight_scale"] = scale
        small[f"{layer}.comfy_quant"] = config_tensor(encoding.config)
        inputs = _input_scale(
            opened, layer, found.get("input_scale"), scale, encoding, calibration, drop_input_scale, done
        )
        if inputs is not None:
            small[f"{layer}.input_scale"] = torch.tensor(inputs)
    if not configs:
        raise NothingToQuantizeError(f"{opened.name} holds no quantized layer; there is nothing to migrate.")
    return configs, [name for name in opened.tensors if name not in gone], small


def _check_orphan(opened: Source, layer: str, found: Mapping[str, str]) -> None:
    """Raise SourceError for a scale that says something of a weight which holds no codes."""
    if "weight_scale" in found and f"{layer}.weight" in opened.tensors:
        scale = opened.read(found["weight_scale"]).float()
        if not (scale == 1).all():
            raise SourceError(
                f"{opened.name}: {found['weight_scale']} scales a weight that is no code ({opened.tensors[f'{layer}.weight'].dtype}), so what "
                "was meant is not known; make the file again from its full-precision original."
            )


def _unscaled(opened: Source, names: Iterable[str], configs: Mapping[str, Mapping]) -> set[str]:
    """Those of FP8 that belong to no quantized layer."""
    return {name for name in names if opened.tensors[name].dtype in UNSCALED and name.rpartition(".")[0] not in configs}


def read_scale(opened: Source, name: str) -> torch.Tensor:
    """A scale as float32. Raises SourceError unless it is finite and positive."""
    scale = opened.read(name)
    if not scale.is_complex():
        scale = scale.float()
    if scale.is_complex() or not (scale.numel() and (torch.isfinite(scale) & (scale > 0)).all()):
        raise SourceError(
            f"{opened.name}: {name} holds values that are not finite and positive; make the file again from its full-precision original."
        )
    return scale


def _input_scale(opened, layer, name, scale, encoding, calibration, drop: bool, done: Migration) -> float | None:
    """The input scale that the layer gets, None for none."""
    known = calibration.layer_statistics(layer) if calibration and encoding.static_inputs else None
    if known is not None and known.histogram is not None and not drop:
        done.changes["input scales measured"] += 1
        return input_scale(known.histogram, float(known.amax.max()))
    if name is None:
        return None
    old = float(read_scale(opened, name).reshape(-1)[0])
    if drop or not encoding.static_inputs or old == 1 or (scale.numel() == 1 and old == float(scale)):
        done.changes["input scales left out"] += 1
        return None
    return old
