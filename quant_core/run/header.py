"""Header of the output of a run: its metadata, and its largest possible size."""

import json
from collections.abc import Mapping

import torch

from ..errors import SourceError
from ..formats.weight import config_bytes
from ..output import PROVENANCE_KEY, QUANTIZATION_KEY, header_bytes, loading_note, quantization_metadata
from ..output.metadata import CONFIG_SUFFIX
from ..recipes import Plan, Recipe
from ..sources import Source, TensorInfo
from ..version import VERSION

__all__ = ["check_name_collisions", "file_metadata", "header_bound", "planned_configs"]


def file_metadata(
    source: Source, recipe: Recipe, configs: Mapping[str, dict[str, object]], fingerprint: str | None
) -> dict[str, str]:
    """Metadata of the source, of ComfyUI's loader and of this package; ``configs``: layer → JSON configuration."""
    origin = {"version": VERSION, "fingerprint": fingerprint, "recipe": recipe.to_dict()}
    return {
        **source.metadata,
        **loading_note(configs),
        QUANTIZATION_KEY: quantization_metadata(configs),
        PROVENANCE_KEY: json.dumps(origin, separators=(",", ":")),
    }


def planned_configs(plan: Plan, recipe: Recipe) -> dict[str, dict[str, object]]:
    """Layer → JSON configuration, of all layers that the plan quantizes."""
    return {
        name.removesuffix(".weight"): recipe.of(plan.decisions[name]).encoding.config for name in plan.names("quantize")
    }


def header_bound(source: Source, plan: Plan, recipe: Recipe, *, calibrated: bool, fingerprint: str | None) -> int:
    """Upper bound of the header size in bytes, whether each planned layer is quantized or, for NaN, copied."""
    tensors = [(name, source.tensors[name]) for name in plan.output_names()]
    for name in plan.names("quantize"):
        layer, encoding = name.removesuffix(".weight"), recipe.of(plan.decisions[name]).encoding
        specs = encoding.specs(source.tensors[name].shape)
        tensors += [(f"{layer}.{suffix}", TensorInfo(*spec)) for suffix, spec in specs.items()]
        if calibrated and encoding.static_inputs:
            tensors.append((f"{layer}.input_scale", TensorInfo(torch.float32, ())))
        tensors.append((layer + CONFIG_SUFFIX, TensorInfo(torch.uint8, (len(config_bytes(encoding.config)),))))
    return header_bytes(tensors, file_metadata(source, recipe, planned_configs(plan, recipe), fingerprint))


def check_name_collisions(source: Source, plan: Plan, recipe: Recipe) -> None:
    """Raise :class:`SourceError` if an unquantized weight already has a tensor with a name that quantizing it adds."""
    kept = set(plan.names("keep"))
    for name in plan.names("quantize"):
        layer = name.removesuffix(".weight")
        specs = recipe.of(plan.decisions[name]).encoding.specs(source.tensors[name].shape)
        for suffix in (*specs, "input_scale", CONFIG_SUFFIX.removeprefix(".")):
            if f"{layer}.{suffix}" in kept:
                raise SourceError(
                    f"{source.name}: tensor {layer}.{suffix} found for an unquantized weight; the file is damaged or partly "
                    "quantized: choose the original file."
                )
