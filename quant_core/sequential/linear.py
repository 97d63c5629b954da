"""A quantized linear layer as ComfyUI computes it on a card, in plain torch."""

from collections.abc import Callable

import torch

from ..formats import Codec
from ..formats.codec import Parts

__all__ = ["LinearFunction", "QuantizedLinear", "quantize_inputs", "reduce_inputs"]

LinearFunction = Callable[[torch.Tensor], torch.Tensor]
"""Replaces the forward of a linear layer: x (…, in) → (…, out)."""

_SLAB = 1 << 26  # activations that are quantized at a time, in float32


def quantize_inputs(
    codec: Codec, x: torch.Tensor, input_scale: float | None, capability: tuple[int, int] | None
) -> torch.Tensor:
    """X̂ of activations (tokens, in), float32; ``input_scale``: the static scale that the layer has, None for 1.

    ``capability``: compute capability of the card; None for one that multiplies the format.
    """
    if input_scale is None or not codec.quantizes_activations(capability):
        return codec.quantize_activations(x, capability)
    return codec.quantize_activations(x.float() / input_scale, capability) * input_scale


def reduce_inputs(
    codec: Codec, x: torch.Tensor, input_scale: float | None, capability: tuple[int, int] | None
) -> torch.Tensor:
    """:func:`quantize_inputs` of activations (…, in), in their shape and dtype, with little memory."""
    rows = x.flatten(0, -2)
    reduced = [
        quantize_inputs(codec, part, input_scale, capability).to(x.dtype)
        for part in rows.split(max(1, _SLAB // rows.shape[1]))
    ]
    return torch.cat(reduced).view(x.shape)


class QuantizedLinear:
    """A :data:`LinearFunction` of a quantized layer.

    Args:
        codec: how the layer is stored.
        parts: its tensors in a file by the last part of their names, on the device of the activations.
        shape: (out, in).
        capability: compute capability of the card; None for one that multiplies the format.
    """

    def __init__(self, codec: Codec, parts: Parts, shape: tuple[int, ...], capability: tuple[int, int] | None):
        self._codec, self._capability = codec, capability
        self._weight, self._bias = codec.dequantize(parts, shape), parts.get("bias")
        scale = parts.get("input_scale")
        self._input_scale = None if scale is None else float(scale)

    def __call__(self, x: torch.Tensor, *_) -> torch.Tensor:
        return self._multiply(reduce_inputs(self._codec, x, self._input_scale, self._capability))

    def without_activations(self) -> LinearFunction:
        """The same layer with unquantized activations."""
        return lambda x, *_: self._multiply(x)

    def _multiply(self, x: torch.Tensor) -> torch.Tensor:
        if self._weight.dtype is not x.dtype:
            self._weight = self._weight.to(x.dtype)
        return torch.nn.functional.linear(x, self._weight, None if self._bias is None else self._bias.to(x))
