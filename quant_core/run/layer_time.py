"""Time of one linear layer in each format, host time included, as this machine runs it: our kernels or comfy-kitchen's."""

import logging
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

import torch
import torch.nn.functional as F

from ... import kernels
from ...kernels.tuning import measure_milliseconds
from ..formats import Codec, Parts
from ..formats.cards import find_support
from ..formats.smoothing import SMOOTHING_KEY
from ..layer import Layer
from ..quantize_layer import quantize_layer
from ..rounding import RoundingConfig
from .kitchen_layers import prepare_kitchen_layer

__all__ = ["TOKENS", "Timer", "measure_layer"]

log = logging.getLogger(__name__)

TOKENS = 4096  # of a call: an image of 1024×1024 pixels in Flux.1
_DTYPE = torch.bfloat16

Run = Callable[[torch.Tensor], torch.Tensor]
"""A linear layer: activations (tokens, in) → (tokens, out)."""
Timer = Callable[[Callable[[], object]], float]
"""Time of a call in ms."""


def _run_scaled(codec: Codec, parts: Parts, device: torch.device) -> Run:
    rotation = codec.rotation.size if codec.rotation else 0
    weight, scale = parts["weight"], parts["weight_scale"]
    return lambda x: kernels.scaled_linear(x, weight, scale, block_size=codec.block_size or 0, rotate_by=rotation)


def _run_static_fp8(codec: Codec, parts: Parts, device: torch.device) -> Run:
    weight, scale = parts["weight"], parts["weight_scale"]
    probe = torch.empty(1, weight.shape[1], dtype=_DTYPE, device=device)
    if not kernels.has_static_fp8(probe, weight, scale):
        return _run_scaled(codec, parts, device)
    return lambda x: kernels.fp8_static_linear(x, weight, scale)


def _run_w4a8(codec: Codec, parts: Parts, device: torch.device) -> Run | None:
    if codec.weight_bits != 4:
        return None
    weight = (parts["weight"], parts["weight_s_rel"], parts["weight_s_channel"], parts.get("weight_codebook"))
    rotation = codec.rotation.size if codec.rotation else 0
    return lambda x: kernels.w4a8_linear(x, *weight, rotate_by=rotation)


# Format → this package's layer with quantized activations. Formats without one are measured with comfy-kitchen or not at all.
_RUNNERS: Mapping[str, Callable[[Codec, Parts, torch.device], Run | None]] = {
    "asym_w4a8_int8": _run_w4a8,
    "int8_tensorwise": _run_scaled,
    "int8_blockwise": _run_scaled,
    "float8_e4m3fn": _run_static_fp8,
    "float8_e4m3fn_rowwise": _run_scaled,
    "float8_e4m3fn_blockwise": _run_scaled,
}


def measure_layer(
    codec: Codec | None,
    shape: tuple[int, int],
    device: torch.device,
    capability: tuple[int, int],
    *,
    tokens: int = TOKENS,
    timer: Timer = measure_milliseconds,
) -> float | None:
    """Time in ms of a layer with bfloat16 activations, by the fastest implementation here; None where there is none.

    Args:
        codec: how the weight is stored; None for bfloat16.
        shape: (out, in) of the weight.
        capability: compute capability of ``device``, which decides whether activations are quantized.
        tokens: rows of the activations.
        timer: measures a call.
    """
    generator = torch.Generator(device).manual_seed(0)
    weight = torch.randn(shape, generator=generator, device=device, dtype=_DTYPE) / math.sqrt(shape[1])
    x = torch.randn(tokens, shape[1], generator=generator, device=device, dtype=_DTYPE)
    if codec is None:
        return timer(lambda: F.linear(x, weight))
    quantized = quantize_layer(Layer(weight), [codec], RoundingConfig("nearest"))
    parts = {suffix: tensor.to(device) for suffix, tensor in codec.store(quantized.solution).items()}
    times = []
    for run in _prepare_runs(codec, parts, shape, device, native=find_support(codec, capability) != "decoded"):
        try:
            times.append(timer(lambda run=run: run(x)))
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # a product that this torch does not have, or a kernel that does not compile
            log.debug("A layer %s of %s cannot be measured: %s", shape, codec, error)
    return min(times, default=None)


def _prepare_runs(
    codec: Codec, parts: Parts, shape: tuple[int, int], device: torch.device, *, native: bool
) -> Iterator[Run]:
    """The implementations of a layer. ``native``: with quantized activations; else with a dequantized weight."""
    smoothing = parts.get(SMOOTHING_KEY)
    codec, parts = replace(codec, smoothing=None), {key: part for key, part in parts.items() if key != SMOOTHING_KEY}
    layers = [prepare_kitchen_layer(codec, parts, shape, _DTYPE, native=native)]
    if not native:
        layers.append(lambda x: F.linear(x, _dequantize(codec, parts, shape)))
    elif runner := _RUNNERS.get(codec.format.name):
        layers.append(runner(codec, parts, device))
    for layer in filter(None, layers):
        yield layer if smoothing is None else _smooth(layer, smoothing.to(device, _DTYPE))


def _smooth(layer: Run, scale: torch.Tensor) -> Run:
    """The layer of smoothed activations; ``scale`` (in,)."""
    return lambda x: layer(x * scale)


def _dequantize(codec: Codec, parts: Parts, shape: tuple[int, int]) -> torch.Tensor:
    """The weight (out, in) in bfloat16, under the scale that ComfyUI casts first where it does."""
    if codec.cast_scale == "weight_scale":
        return parts["weight"].to(_DTYPE) * parts["weight_scale"].to(_DTYPE)
    return codec.dequantize(parts, shape).to(_DTYPE)
