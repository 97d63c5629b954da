"""A quantized linear layer as ComfyUI computes it on a card, in plain torch."""

from collections.abc import Callable

import torch

from ...kernels import quantize_int8_row
from ..formats import INT8, Codec
from ..formats.codec import Parts
from ..formats.rotation import GROUP_SIZES

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
    if not codec.quantizes_activations(capability):
        return x.float()
    return codec.restore(_quantize_stored(codec, x, input_scale, capability))


def _quantize_stored(
    codec: Codec, x: torch.Tensor, input_scale: float | None, capability: tuple[int, int] | None
) -> torch.Tensor:
    """:func:`quantize_inputs` in the stored basis, on a card that quantizes activations."""
    if input_scale is None:
        return codec.quantize_stored(x, capability)
    return codec.quantize_stored(x.float() / input_scale, capability) * input_scale


def reduce_inputs(
    codec: Codec, x: torch.Tensor, input_scale: float | None, capability: tuple[int, int] | None
) -> torch.Tensor:
    """:func:`quantize_inputs` of activations (…, in), in their shape and dtype, with little memory."""
    return _by_slabs(lambda rows: quantize_inputs(codec, rows, input_scale, capability), x)


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
        weight = codec.dequantize(parts, shape)
        self._weight = codec.basis.apply_weight(weight) if codec.basis else weight
        self._bias, scale = parts.get("bias"), parts.get("input_scale")
        self._input_scale = None if scale is None else float(scale)

    def __call__(self, x: torch.Tensor, *_) -> torch.Tensor:
        if not self._codec.quantizes_activations(self._capability):
            return self._multiply(x)
        return self._multiply_stored(_by_slabs(self._quantize, x))

    def without_activations(self) -> LinearFunction:
        """The same layer with unquantized activations."""
        return lambda x, *_: self._multiply(x)

    def _quantize(self, rows: torch.Tensor) -> torch.Tensor:
        """X̂ of activations (tokens, in) in the stored basis."""
        codec = self._codec
        if rows.is_cuda and _has_kernel(codec, self._capability):
            qdata, scale = quantize_int8_row(rows, rotate_by=codec.rotation.size if codec.rotation else 0)
            return qdata * scale
        return _quantize_stored(codec, rows, self._input_scale, self._capability)

    def _multiply(self, x: torch.Tensor) -> torch.Tensor:
        basis = self._codec.basis
        return self._multiply_stored(_by_slabs(basis.apply, x) if basis else x)

    def _multiply_stored(self, x: torch.Tensor) -> torch.Tensor:
        if self._weight.dtype is not x.dtype:
            self._weight = self._weight.to(x.dtype)
        return torch.nn.functional.linear(x, self._weight, None if self._bias is None else self._bias.to(x))


def _has_kernel(codec: Codec, capability: tuple[int, int] | None) -> bool:
    """Whether one kernel rotates and quantizes the activations of a layer."""
    rotation = codec.rotation
    fused = rotation is None or rotation.size in GROUP_SIZES
    return fused and codec.format.activations == "token" and codec.activation_elements(capability) == INT8


def _by_slabs(function: LinearFunction, x: torch.Tensor) -> torch.Tensor:
    """A function of rows (tokens, in) on activations (…, in), in their shape and dtype, with little memory."""
    rows = x.reshape(-1, x.shape[-1])
    parts = [function(part).to(x.dtype) for part in rows.split(max(1, _SLAB // rows.shape[1]))]
    return (parts[0] if len(parts) == 1 else torch.cat(parts)).view(x.shape)
