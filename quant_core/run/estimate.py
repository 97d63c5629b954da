"""What a run will give and take, before it is run: bytes from shapes, seconds from one made-up layer of each shape."""

import math
import time
from collections import Counter

import torch

from ..quantize_layer import quantize_weight
from ..recipes import Plan, Recipe
from ..sources import Source, TensorInfo

__all__ = ["estimate_seconds", "estimate_size"]


def estimate_size(source: Source, recipe: Recipe, plan: Plan) -> int:
    """Bytes of all tensors of the file that the plan leads to, its header left aside."""
    return sum(_size(name, source.tensors[name], recipe, plan) for name in plan.output_names())


def _size(name: str, info: TensorInfo, recipe: Recipe, plan: Plan) -> int:
    decision = plan.decisions[name]
    if decision.action != "quantize":
        return info.nbytes
    return sum(spec.nbytes for spec in recipe.of(decision).codec.file_specs(info.shape).values())


def estimate_seconds(source: Source, recipe: Recipe, plan: Plan, device: torch.device) -> float:
    """Seconds of rounding on ``device``, without a calibration; reading and writing, which go on meanwhile, are not in it.

    Of each shape and recipe a random weight is quantized twice, and the second time counts for all layers alike.
    """
    layers = Counter((source.tensors[name], recipe.of(plan.decisions[name])) for name in plan.names("quantize"))
    return sum(count * _seconds(info, own, device) for (info, own), count in layers.items())


def _seconds(info: TensorInfo, recipe: Recipe, device: torch.device) -> float:
    generator = torch.Generator(device).manual_seed(0)
    weight = torch.randn(info.shape, generator=generator, device=device, dtype=torch.float32).to(info.dtype)
    weight /= math.sqrt(info.shape[1])
    for _ in range(2):  # the first compiles kernels
        start = time.perf_counter()
        quantize_weight(weight, **recipe.layer_options).qdata.cpu()
        seconds = time.perf_counter() - start
    return seconds
