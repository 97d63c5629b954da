"""Size and time of a run before it starts: bytes from shapes, seconds from one random weight of each shape."""

import math
import time
from collections import Counter
from dataclasses import replace

import torch

from ..layer import Layer
from ..quantize_layer import quantize_layer
from ..recipes import Plan, Recipe
from ..sources import Source, TensorInfo

__all__ = ["estimate_seconds", "estimate_size", "tensor_size"]


def estimate_size(source: Source, recipe: Recipe, plan: Plan) -> int:
    """Bytes of all tensors of the output, without its header."""
    return sum(tensor_size(name, source.tensors[name], recipe, plan) for name in plan.output_names())


def tensor_size(name: str, info: TensorInfo, recipe: Recipe, plan: Plan) -> int:
    """Bytes of a source tensor in the output, or of the tensors of its quantized layer."""
    decision = plan.decisions[name]
    if decision.action != "quantize":
        return info.nbytes
    codec = recipe.of(decision).format.codec_for(info.shape[-1])
    return sum(spec.nbytes for spec in codec.file_specs(info.shape).values())


def estimate_seconds(source: Source, recipe: Recipe, plan: Plan, device: torch.device) -> float:
    """Time in s of the rounding on ``device`` without a calibration; reading and writing run at the same time and are not included.

    A random weight of each shape and recipe is quantized twice; the second time applies to all layers and experts like it.
    """
    layers: Counter[tuple[TensorInfo, Recipe]] = Counter()
    for name in plan.names("quantize"):
        info = source.tensors[name]
        bank, matrix = info.shape[:-2], replace(info, shape=info.shape[-2:])
        layers[matrix, recipe.of(plan.decisions[name])] += math.prod(bank)
    return sum(count * _time_layer(info, layer_recipe, device) for (info, layer_recipe), count in layers.items())


def _time_layer(info: TensorInfo, recipe: Recipe, device: torch.device) -> float:
    """Time in s to quantize a random weight."""
    generator = torch.Generator(device).manual_seed(0)
    weight = torch.randn(info.shape, generator=generator, device=device, dtype=torch.float32).to(info.dtype)
    weight /= math.sqrt(info.shape[1])
    seconds = 0.0
    for _ in range(2):  # the first pass compiles kernels
        start = time.perf_counter()
        quantize_layer(
            Layer(weight), recipe.format.codecs(weight.shape[1]), recipe.rounding, seed=recipe.seed
        ).qdata.cpu()
        seconds = time.perf_counter() - start
    return seconds
