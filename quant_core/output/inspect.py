"""What is in a file, from its header and its small tensors alone."""

import os
import re
from collections import Counter
from dataclasses import dataclass

from ..display import human_bytes
from ..formats import FORMATS
from ..sources.dtypes import DTYPE_NAMES
from ..sources.opening import open_safetensors
from ..sources.source import Source
from .metadata import ENCODER_PREFIX, layer_configs, provenance
from .verify import CODE_DTYPES, layer_encoding

__all__ = ["BITSANDBYTES", "Inspection", "inspect_file", "quantized_formats"]

BITSANDBYTES = "bitsandbytes"
_ENCODERS_SINCE = "0.33"  # the oldest ComfyUI of which that is known


def quantized_formats(source: Source) -> list[str]:
    """Names of the quantizations a source already carries; empty for plain weights."""
    configs, header = layer_configs(source)
    found = {str(config.get("format")) for config in (*configs.values(), *header.values())}
    names = source.tensors
    if any(name.endswith((".scale_weight", "scaled_fp8")) for name in names):
        found.add("scaled fp8 (old)")
    if any(name.endswith((".quant_map", ".absmax")) for name in names):
        found.add(BITSANDBYTES)
    if not found:
        raw = {
            info.dtype
            for name, info in names.items()
            if name.endswith(".weight") and len(info.shape) == 2 and info.dtype in CODE_DTYPES
        }
        found |= {f"plain {DTYPE_NAMES[dtype]} weights" for dtype in raw}
    return sorted(found)


@dataclass(frozen=True)
class Inspection:
    """What a file holds.

    Attributes:
        dtypes: dtype name → (tensors, bytes).
        quantized: "format per granularity", block size and rotation with it → layers; a layer that breaks the contract counts as "… (broken)".
        layers: the same keys → {name of layers, with * for their numbers: how many of them}.
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
        """All of it for people, in a few lines."""
        lines = [f"{self.path}: {human_bytes(self.size)}, {self.tensors} tensors", self.stock]
        lines += [
            f"  {name:<8} {count:>6} tensors  {human_bytes(size):>8}" for name, (count, size) in self.dtypes.items()
        ]
        for name, count in self.quantized.items():
            lines.append(f"  {name}: {count} layers")
            lines += [f"    {layers:>4} × {pattern}" for pattern, layers in self.layers[name].items()]
        if self.made_by:
            recipe = self.made_by.get("recipe")
            chosen = recipe.items() if isinstance(recipe, dict) else ()
            told = [f"{key} {value}" for key, value in chosen if value not in (None, "", []) and value is not False]
            lines.append(f"  made by learned_rounding {self.made_by.get('version')}: {', '.join(told)}")
        return "\n".join(lines)


def _stock(found: list[str], encoders: bool) -> str:
    """``encoders``: text encoders of a checkpoint are quantized."""
    if not found:
        return "Stock ComfyUI loads it as plain weights."
    unknown = [name for name in found if name not in FORMATS]
    if unknown:
        return f"It holds {', '.join(unknown)}, which this version cannot judge."
    ours = [name for name in found if FORMATS[name].stock_since is None]
    if ours:
        return f"ComfyUI's own loaders read {', '.join(ours)} only with this node pack installed."
    releases = [FORMATS[name].stock_since for name in found] + [_ENCODERS_SINCE] * encoders
    since = max(releases, key=lambda release: [int(part) for part in release.split(".")])
    return f"Stock ComfyUI {since} and newer loads it."


def inspect_file(path: str | os.PathLike) -> Inspection:
    """Look into a safetensors file, or into shards by their index or folder. Raises SourceError when it cannot be read."""
    with open_safetensors(path) as source:
        counts, sizes = Counter(), Counter()
        for info in source.tensors.values():
            counts[DTYPE_NAMES[info.dtype]] += 1
            sizes[DTYPE_NAMES[info.dtype]] += info.nbytes
        configs, header = layer_configs(source)
        layers: dict[str, Counter] = {}
        for layer, config in (configs or header).items():
            try:
                kind = str(layer_encoding(layer, config, source.tensors))
            except ValueError:
                kind = f"{config.get('format')} (broken)"
            layers.setdefault(kind, Counter())[re.sub(r"\b\d+\b", "*", layer)] += 1
        return Inspection(
            path=str(path),
            size=source.size,
            tensors=len(source.tensors),
            dtypes={name: (counts[name], sizes[name]) for name in sorted(sizes, key=lambda name: -sizes[name])},
            quantized={kind: counts.total() for kind, counts in layers.items()},
            layers={kind: dict(counts) for kind, counts in layers.items()},
            stock=_stock(
                quantized_formats(source), any(layer.startswith(ENCODER_PREFIX) for layer in configs or header)
            ),
            made_by=provenance(source),
        )
