"""What a run will do, from the names and shapes of its source: sizes, layers, formats, and an estimate of its time."""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from ..formats import Codec
from ..output.layout import HEADER_LENGTH
from ..recipes import Recipe
from ..sources import Source
from .estimate import estimate_size
from .header import header_bound
from .throughput import predict_seconds

__all__ = ["RunPreview", "preview_run"]

_FINGERPRINT = "0" * 32  # as long as one of :func:`~.fingerprint.run_fingerprint`, which reads samples of the tensors


@dataclass(frozen=True)
class RunPreview:
    """A run before it starts.

    Attributes:
        bytes_in: size of the source files, or of the tensors of a source in memory.
        bytes_out: size of the output file; None for mixed precision without a target size, which decides it during the run.
        layers: number of layers to quantize.
        unquantized: number of other tensors of the output.
        formats: codec as text → (codec, number of its layers), that of the recipe first; empty for mixed precision.
        seconds: estimate of the time in s, see :mod:`.throughput`; None if nothing comparable was measured.
    """

    bytes_in: int
    bytes_out: int | None
    layers: int
    unquantized: int
    formats: Mapping[str, tuple[Codec, int]]
    seconds: float | None


def preview_run(
    source: Source,
    recipe: Recipe,
    device: torch.device,
    *,
    calibrated: bool = False,
    general: bool | None = None,
) -> RunPreview:
    """Preview the run of a recipe over a source on ``device``; reads no tensor.

    The output size is exact without a calibration, if no layer contains NaN and, with ConvRot "auto", all take the largest group. A
    calibration adds a scale of 4 bytes to an FP8 layer, and smoothing a vector.

    Args:
        calibrated: the run has a calibration, with statistics of every layer.
        general: see :func:`~..recipes.make_plan`.

    Raises:
        QuantizationError: the run would end with it before its first layer.
    """
    rounding = recipe.resolve(calibrated)
    plan = recipe.plan(source, general=general)
    names = list(plan.names("quantize"))
    bytes_in = sum(Path(path).stat().st_size for path in getattr(source, "paths", ())) or sum(
        info.nbytes for info in source.tensors.values()
    )
    unquantized = len(list(plan.output_names())) - len(names)
    if recipe.format.measured:
        target = None if recipe.target_size is None else round(recipe.target_size * 1e9)
        return RunPreview(bytes_in, target, len(names), unquantized, {}, None)
    fingerprint = _FINGERPRINT if hasattr(source, "sample") else None
    header = header_bound(source, plan, recipe, calibrated=calibrated, fingerprint=fingerprint)
    codecs = {name: recipe.of(plan.decisions[name]).format.codec_for(source.tensors[name].shape[-1]) for name in names}
    counts, by_name = Counter(map(str, codecs.values())), {str(codec): codec for codec in codecs.values()}
    layers = (
        (math.prod(source.tensors[name].shape), rounding.rounding, codec.weight_bits) for name, codec in codecs.items()
    )

    def rank(name: str) -> tuple[bool, int]:
        return by_name[name].format.name != recipe.format.name, -counts[name]

    return RunPreview(
        bytes_in=bytes_in,
        bytes_out=HEADER_LENGTH.size + header + estimate_size(source, recipe, plan),
        layers=len(names),
        unquantized=unquantized,
        formats={name: (by_name[name], counts[name]) for name in sorted(counts, key=rank)},
        seconds=predict_seconds(layers, device),
    )
