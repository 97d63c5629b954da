"""What is in a file, from its header and its small tensors alone."""

import os
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from ..display import bound_lines, human_bytes, mask_numbers
from ..formats import READABLE, Codec, detect_layer
from ..formats.expert_bank import count_experts
from ..formats.kinds import Kind, find_kinds, quantized_formats
from ..formats.layer_json import file_layers, layer_configs
from ..formats.smoothing import SMOOTHING_KEY
from ..formats.table import newest_release
from ..sources import TensorInfo, open_safetensors
from ..sources.diffusers_names import Family, find_family
from ..sources.dtypes import DTYPE_NAMES
from .metadata import ENCODER_PREFIX, MODEL_RUN_KEY, describe_model_run, provenance

__all__ = ["Inspection", "inspect_file"]

_BROKEN, _SMOOTHED = " (broken)", ", smoothed"
# First ComfyUI known to read quantized text encoders in a checkpoint, quantized embeddings, and banks of experts.
_ENCODERS_SINCE = "0.33"
_TABLE = re.compile(r"(?:^|\.)(?:embed_tokens|shared|token_embedding)$")


@dataclass(frozen=True)
class Inspection:
    """What a file contains.

    Attributes:
        dtypes: dtype name → (tensors, bytes).
        quantized: codec as text → number of layers; a layer that breaks the contract counts as "… (broken)".
        layers: the same keys → {name of layers, with * for their numbers: number of layers}.
        stock: what stock ComfyUI does with the file, one sentence.
        made_by: the provenance entry of the header.
    """

    path: str
    size: int
    tensors: int
    dtypes: dict[str, tuple[int, int]]
    quantized: dict[str, int]
    layers: dict[str, dict[str, int]]
    stock: str
    made_by: dict

    def __str__(self) -> str:
        """A few lines for users."""
        lines = [f"{self.path}: {human_bytes(self.size)}, {self.tensors} tensors", self.stock]
        lines += [
            f"  {name:<8} {count:>6} tensors  {human_bytes(size):>8}" for name, (count, size) in self.dtypes.items()
        ]
        for name, count in self.quantized.items():
            lines.append(f"  {name}: {count} layers")
            lines += [f"    {layers:>4} × {pattern}" for pattern, layers in self.layers[name].items()]
        if self.made_by:
            recipe = self.made_by.get("recipe")
            options = recipe.items() if isinstance(recipe, dict) else ()
            given = [f"{key} {value}" for key, value in options if value not in (None, "", []) and value is not False]
            lines.append(f"  made by learned_rounding {self.made_by.get('version')}: {', '.join(given)}")
            if run := describe_model_run(self.made_by.get(MODEL_RUN_KEY)):
                lines.append(f"  rounded with the running model: {run}")
        return bound_lines(lines)


def inspect_file(path: str | os.PathLike) -> Inspection:
    """Inspect a safetensors file, or shards by their index, folder or one of them.

    Raises:
        SourceError: the file cannot be read.
    """
    with open_safetensors(path) as source:
        counts, sizes = Counter(), Counter()
        for info in source.tensors.values():
            counts[DTYPE_NAMES[info.dtype]] += 1
            sizes[DTYPE_NAMES[info.dtype]] += info.nbytes
        configs = file_layers(*layer_configs(source))
        kinds = find_kinds(source)
        layers: dict[str, Counter] = {}
        kitchens = set()
        for layer, config in configs.items():
            if layer not in kinds:
                codec = _detect(layer, config, source.tensors)
                name = (
                    f"{codec}{_SMOOTHED * _is_smoothed(layer, source.tensors)}"
                    if codec
                    else f"{config.get('format')}{_BROKEN}"
                )
                layers.setdefault(name, Counter())[mask_numbers(layer)] += 1
                kitchens.add(codec and codec.kitchen_since)
        for layer, kind in kinds.items():
            layers.setdefault(kind.name, Counter())[mask_numbers(layer)] += 1
        smoothed = {
            str(config.get("format")) for layer, config in configs.items() if _is_smoothed(layer, source.tensors)
        }
        encoders = any(
            layer.startswith(ENCODER_PREFIX) or _TABLE.search(layer) or count_experts(layer, config, source.tensors)
            for layer, config in configs.items()
        )
        return Inspection(
            path=str(path),
            size=source.size,
            tensors=len(source.tensors),
            dtypes={name: (counts[name], sizes[name]) for name in sorted(sizes, key=lambda name: -sizes[name])},
            quantized={kind: counts.total() for kind, counts in layers.items()},
            layers={kind: dict(counts) for kind, counts in layers.items()},
            stock=_stock_support(
                find_family(source.tensors),
                quantized_formats(source),
                set(kinds.values()),
                encoders,
                any(kind.endswith(_BROKEN) for kind in layers),
                smoothed,
                newest_release(kitchens),
            ),
            made_by=provenance(source),
        )


def _detect(layer: str, config: Mapping[str, object], tensors: Mapping[str, TensorInfo]) -> Codec | None:
    """The codec of a layer with JSON; None where its tensors contradict the JSON."""
    try:
        return detect_layer(layer, config, tensors)
    except ValueError:
        return None


def _is_smoothed(layer: str, tensors: Mapping[str, TensorInfo]) -> bool:
    return f"{layer}.{SMOOTHING_KEY}" in tensors


def _stock_support(
    family: Family | None,
    found: list[str],
    kinds: set[Kind],
    encoders: bool,
    broken: bool,
    smoothed: set[str],
    kitchen: str | None,
) -> str:
    """What stock ComfyUI does with such formats.

    Args:
        family: that of diffusers' tensor names.
        found: names of all quantizations.
        kinds: those that no layer JSON names.
        encoders: text encoders of a checkpoint, embeddings or banks of experts are quantized.
        broken: some layers do not have the tensors that their JSON implies.
        smoothed: formats of layers that have a ``pre_quant_scale``.
        kitchen: first comfy-kitchen that runs all layers, where it is newer than that of the ComfyUI that reads them.
    """
    if problems := sorted(kind for kind in kinds if kind.name in found):
        return " ".join(f"It contains {kind.name}. {kind.support}." for kind in problems)
    if not found:
        return "Nothing in it is quantized."
    if unknown := [name for name in found if name not in READABLE]:
        return f"It contains {', '.join(unknown)}, which this version does not know."
    if broken:
        return "Some of its layers do not have the tensors that their layer JSON implies; lrq verify names them."
    if family:
        return (
            f"Its tensor names are diffusers' of {family.title}, under which ComfyUI loads no quantized layers; lrq quantize "
            "--requantize gives them ComfyUI's names."
        )
    releases = [READABLE[name].stock_since for name in found] + [_ENCODERS_SINCE] * encoders
    releases += [since for name in smoothed if (since := READABLE[name].smoothed_since)]
    if None in releases:
        ours = [name for name in found if READABLE[name].stock_since is None]
        return f"ComfyUI's own loaders read {', '.join(ours)} only with this node pack installed."
    since = newest_release(releases)
    needed = f" with comfy-kitchen {kitchen} or newer" if kitchen else ""
    return f"Stock ComfyUI {since} and newer loads it{needed}."
