"""Write quantized files that ComfyUI misreads, or reads by legacy rules only, in its current format; quantized values stay.

Only labels change: legacy scaled FP8 (``scaled_fp8``, ``scale_weight``, ``scale_input``), per-row or block scales under
the name of a per-tensor format, layers without their JSON, scales of no layer, input scales. FP8 without a scale becomes
the plain weights that ComfyUI takes it for.
"""

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch

from ..calibration import Calibration, input_scale
from ..errors import NothingToQuantizeError, OutputExistsError, SourceError
from ..formats import Codec, StoredLayer, detect_layers
from ..formats.detect import UNSCALED_DTYPES, check_companions, legacy_markers, orphan_problem, read_scale
from ..formats.external import plain_metadata
from ..formats.layer_json import (
    CONFIG_KEY,
    QUANTIZATION_KEY,
    config_tensor,
    layer_configs,
    quantization_metadata,
)
from ..output import SafetensorsWriter, final_path, header_bytes, keep_apart, loading_note, provenance, remove_leftovers
from ..output.verify import verify_source
from ..sources import Source, TensorInfo, TensorSource, open_safetensors
from ..sources.diffusers_names import find_family

__all__ = ["PLAIN", "Migration", "migrate_file"]

PLAIN = torch.bfloat16  # dtype of dequantized weights: it holds every FP8 number, and eight bits of precision


@dataclass
class Migration:
    """What was changed.

    Attributes:
        layers: codec as text → number of layers in the new file.
        changes: sentence → number of layers or tensors that it applies to.
        removed: names of tensors that belonged to no quantized layer.
    """

    layers: Counter = field(default_factory=Counter)
    changes: Counter = field(default_factory=Counter)
    removed: list[str] = field(default_factory=list)


def migrate_file(
    source: str | os.PathLike,
    destination: str | os.PathLike,
    *,
    calibration: Calibration | None = None,
    drop_input_scale: bool = False,
    overwrite: bool = False,
) -> Migration:
    """Write the quantized file ``source``, or its shards, in ComfyUI's current format, one tensor at a time.

    Args:
        calibration: gives FP8 layers per tensor a measured ``input_scale`` in place of the one they have.
        drop_input_scale: leave every input scale out. One that equals the weight's scale is a copy that clips
            activations and is always left out, as are 1 and scales of channels.

    Raises:
        NothingToQuantizeError: the source has no quantized layer.
        SourceError: a layer is in no known format, or would not be valid afterwards.
        OutputError: the output cannot be written, exists (without ``overwrite``) or is the source or the calibration.
    """
    destination = final_path(destination)
    with open_safetensors(source) as opened:
        keep_apart(destination, {"source": opened.paths, "calibration": getattr(calibration, "paths", ())})
        if destination.exists() and not overwrite:
            raise OutputExistsError(f"{destination} exists; choose another output or overwrite it.")
        if family := find_family(opened.tensors):
            raise SourceError(
                f"{opened.name} has diffusers' tensor names of {family.title}, under which ComfyUI loads no quantized layers; run "
                "lrq quantize --requantize, which gives them ComfyUI's names."
            )
        provenance(opened)  # is copied: one that cannot be read is refused before anything is written
        relabelling = _Relabelling(opened, calibration, drop_input_scale)
        metadata = {key: value for key, value in plain_metadata(opened).items() if key != QUANTIZATION_KEY}
        metadata |= {QUANTIZATION_KEY: quantization_metadata(relabelling.configs), **loading_note(relabelling.configs)}
        infos = relabelling.infos()
        relabelling.check_valid(infos)
        with SafetensorsWriter(destination, header_bytes(infos.items(), metadata), overwrite=overwrite) as writer:
            for name, stored in relabelling.copied.items():
                values = opened.read(stored)
                writer.add(name, values.to(PLAIN) if name in relabelling.plain else values)
            for name, tensor in relabelling.small.items():
                writer.add(name, tensor)
            writer.finish(metadata)
    remove_leftovers(destination)
    return relabelling.done


class _Relabelling:
    """The new file of a migration.

    Attributes:
        configs: {layer: JSON} of the new file.
        copied: new name → name in the source of the tensors that are copied.
        plain: those of them that are FP8 without a scale, and are written as plain weights.
        small: new tensors by name.
        done: what was changed.
    """

    def __init__(self, source: Source, calibration: Calibration | None, drop_input_scale: bool):
        self._source, self._calibration, self._drop = source, calibration, drop_input_scale
        self.done, self.configs, self.small = Migration(), {}, {}
        markers = legacy_markers(source)
        if markers:
            self.done.changes["legacy scaled FP8 marker replaced"] = len(markers)
        tensors, header = layer_configs(source)
        self._disputed = {layer for layer, config in tensors.items() if config != header.get(layer, config)}
        if self._disputed:
            sentence = f"layers whose {CONFIG_KEY} tensor differed from the header, which ComfyUI reads"
            self.done.changes[sentence] = len(self._disputed)
        self._replaced, self._renamed = set(markers), {}
        layers = list(detect_layers(source))
        for layer in layers:
            self._add_layer(layer)
        check_companions(source, layers)
        if not self.configs:
            raise NothingToQuantizeError(f"{source.name} has no quantized layer; there is nothing to migrate.")
        self.copied = {self._renamed.get(name, name): name for name in source.tensors if name not in self._replaced}
        self.plain = {name for name, stored in self.copied.items() if self._is_unscaled(name, stored)}
        if self.plain:
            sentence = "FP8 tensors without a scale written as plain weights, which ComfyUI takes them for"
            self.done.changes[sentence] = len(self.plain)

    def _add_layer(self, layer: StoredLayer) -> None:
        if layer.external is not None and not layer.external.renamed:
            raise SourceError(
                layer.problem
                or f"{self._source.name}: {layer.name} is in format {layer.external.name}, for which ComfyUI has no format; use lrq quantize "
                "--requantize, or the full-precision original."
            )
        if not layer.relabelled:
            self.configs[layer.name] = layer.config
            if layer.name in self._disputed:
                self._put(layer.name, CONFIG_KEY, config_tensor(layer.config))
            return
        others = {suffix: name for suffix, name in layer.parts.items() if suffix != "weight"}
        self._replaced.update(others.values())
        if layer.codec is None:
            if problem := orphan_problem(self._source, layer):
                raise SourceError(problem)
            self.done.changes["tensors of no quantized layer removed"] += len(others)
            self.done.removed += others.values()
            return
        self._relabel(layer, layer.codec)

    def _relabel(self, layer: StoredLayer, codec: Codec) -> None:
        config = self.configs[layer.name] = codec.file_config(layer.shape)
        self.done.layers[str(codec)] += 1
        stored, name = layer.parts["weight"], f"{layer.name}.weight"
        if stored != name:
            if name in self._source.tensors:
                raise SourceError(
                    f"{self._source.name}: {name} and {stored} are two weights of one layer; give the full-precision original."
                )
            self._renamed[stored] = name
        if config != layer.config:
            before, now = _describe_before(layer), codec.format.name
            renamed = f"layers labelled {now}, before {before}"
            self.done.changes[renamed if now != before else f"{now} layers whose JSON was corrected"] += 1
        for suffix, spec in codec.file_specs(layer.shape).items():
            if suffix not in ("weight", CONFIG_KEY):
                scale = layer.read_scale(self._source, suffix)
                scale = scale.reshape(spec.shape) if scale.dim() else scale.expand(spec.shape).contiguous()
                self._put(layer.name, suffix, scale)
        self._put(layer.name, CONFIG_KEY, config_tensor(config))
        activations = self._input_scale(layer, scale)
        if activations is not None:
            self._put(layer.name, "input_scale", torch.tensor(activations))

    def _put(self, layer: str, suffix: str, tensor: torch.Tensor) -> None:
        self.small[f"{layer}.{suffix}"] = tensor
        self._replaced.add(f"{layer}.{suffix}")

    def _input_scale(self, layer: StoredLayer, scale: torch.Tensor) -> float | None:
        """The input scale that the layer gets, None for none."""
        static = layer.codec is not None and layer.codec.static_activations
        known = self._calibration.layer_statistics(layer.name) if self._calibration and static else None
        if known is not None and known.histogram is not None and known.amax is not None and not self._drop:
            self.done.changes["input scales measured"] += 1
            return input_scale(known.histogram, float(known.amax.max()))
        if "input_scale" not in layer.parts:
            return None
        old = read_scale(self._source, layer.parts["input_scale"])
        if (
            self._drop
            or not static
            or old.numel() > 1
            or old == 1
            or (scale.numel() == 1 and float(old) == float(scale))
        ):
            self.done.changes["input scales left out"] += 1
            return None
        return float(old)

    def _is_unscaled(self, name: str, stored: str) -> bool:
        return self._source.tensors[stored].dtype in UNSCALED_DTYPES and name.rpartition(".")[0] not in self.configs

    def infos(self) -> dict[str, TensorInfo]:
        """Name → dtype and shape of all tensors of the new file."""
        infos = {
            name: replace(self._source.tensors[stored], dtype=PLAIN)
            if name in self.plain
            else self._source.tensors[stored]
            for name, stored in self.copied.items()
        }
        return infos | {name: TensorInfo(tensor.dtype, tuple(tensor.shape)) for name, tensor in self.small.items()}

    def check_valid(self, infos: Mapping[str, TensorInfo]) -> None:
        """Raise SourceError unless ``lrq verify`` finds the new file valid, layers whose JSON is copied left out."""
        copied = {layer for layer, config in self.configs.items() if not StoredLayer(layer, config).relabelled}
        ours = {layer: config for layer, config in self.configs.items() if layer not in copied}
        read = {name: tensor for name, tensor in self.small.items() if name.rpartition(".")[0] not in copied}
        made = TensorSource(read, {QUANTIZATION_KEY: quantization_metadata(ours)}, self._source.name)
        made.tensors |= {name: info for name, info in infos.items() if name.rpartition(".")[0] not in copied}
        if problems := verify_source(made).problems:
            raise SourceError(f"{self._source.name} would not become a valid file: {problems[0]}")


def _describe_before(layer: StoredLayer) -> str:
    """What named the format of a layer before."""
    if layer.external is not None:
        return f"in format {layer.external.name}"
    return layer.config.get("format") or ("without a format" if layer.config else "without JSON")
