"""Header of the output of a run: its metadata, and its largest possible size."""

import json
from collections.abc import Mapping

from ..errors import SourceError
from ..formats import Codec
from ..formats.companions import is_weight_scale
from ..formats.layer_json import QUANTIZATION_KEY, quantization_metadata
from ..output import PROVENANCE_KEY, header_bytes, loading_note
from ..recipes import Plan, Recipe
from ..sources import Source, TensorInfo
from ..version import VERSION
from .blocks import WalkSummary

__all__ = ["check_name_collisions", "file_metadata", "header_bound", "planned_configs"]

_SUMMARY_BYTES = 5000  # at most, of what is recorded of a run with a model; 14 for one character of its reason


def file_metadata(
    source: Source,
    plan: Plan,
    recipe: Recipe,
    configs: Mapping[str, dict[str, object]],
    fingerprint: str | None,
    summary: WalkSummary | None = None,
) -> dict[str, str]:
    """Metadata of the source, of ComfyUI's loader and of this package.

    Args:
        configs: layer → JSON configuration.
        summary: of a run with a model.
    """
    kitchens = {recipe.of(plan.decisions[name]).format.codec.kitchen_since for name in plan.names("quantize")}
    origin: dict[str, object] = {"version": VERSION, "fingerprint": fingerprint, "recipe": recipe.to_dict()}
    if summary is not None:
        origin["sequential"] = summary.to_dict()
    return {
        **source.metadata,
        **loading_note(configs, kitchens),
        QUANTIZATION_KEY: quantization_metadata(configs),
        PROVENANCE_KEY: json.dumps(origin, separators=(",", ":")),
    }


def planned_configs(source: Source, plan: Plan, recipe: Recipe) -> dict[str, dict[str, object]]:
    """Layer → JSON configuration, of all layers that the plan quantizes."""
    return {
        name.removesuffix(".weight"): _codec(source, plan, recipe, name).file_config(source.tensors[name].shape)
        for name in plan.names("quantize")
    }


def _codec(source: Source, plan: Plan, recipe: Recipe, name: str) -> Codec:
    """The codec of a layer's format with the longest JSON."""
    return recipe.of(plan.decisions[name]).format.codec_for(source.tensors[name].shape[-1])


def header_bound(source: Source, plan: Plan, recipe: Recipe, *, calibrated: bool, fingerprint: str | None) -> int:
    """Upper bound of the header size in bytes, whether each planned layer is quantized or, for NaN, copied."""
    tensors = [(name, source.tensors[name]) for name in plan.output_names()]
    for name in plan.names("quantize"):
        layer, codec = name.removesuffix(".weight"), _codec(source, plan, recipe, name)
        specs = codec.file_specs(source.tensors[name].shape, calibrated=calibrated)
        tensors += [(f"{layer}.{suffix}", TensorInfo(spec.dtype, spec.shape)) for suffix, spec in specs.items()]
    metadata = file_metadata(source, plan, recipe, planned_configs(source, plan, recipe), fingerprint)
    if recipe.rounding.runs_model:
        metadata["sequential"] = " " * _SUMMARY_BYTES
    return header_bytes(tensors, metadata)


def check_name_collisions(source: Source, plan: Plan, recipe: Recipe) -> None:
    """Raise :class:`SourceError` if an unquantized weight already has a scale, or another tensor that quantizing it adds."""
    layers = {}
    for name in plan.names("quantize"):
        codec, shape = _codec(source, plan, recipe, name), source.tensors[name].shape
        layers[name.removesuffix(".weight")] = {**codec.file_specs(shape, calibrated=True), "input_scale": None}
    added = {f"{layer}.{suffix}" for layer, suffixes in layers.items() for suffix in suffixes}
    for name in plan.names("keep"):
        if name in added or is_weight_scale(name, layers):
            raise SourceError(
                f"{source.name}: tensor {name} found for an unquantized weight; the file is damaged or partly "
                "quantized: choose the original file."
            )
