"""Check the values of quantized tensors, which no loader does: NaN, scales that a host's dtype cannot hold, layers of zeros.

One tensor is in memory at a time, and a slice of it.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch

from ..cancellation import CancelCheck
from ..formats import Codec, Parts

__all__ = ["Finding", "check_fp8_values", "check_layer_values", "is_finite"]

_SLICE = 1 << 24  # bytes
_AGAIN = "quantize the layer again from its full-precision original"
_TOLERANCE = 0.01  # relative error of a scale in the dtype that ComfyUI casts it to; quantized values have more


class Finding(NamedTuple):
    """One sentence about a file; ``fatal``: the file is not valid."""

    text: str
    fatal: bool = True


def check_layer_values(
    layer: str,
    codec: Codec,
    shape: tuple[int, ...],
    weight: torch.Tensor,
    scales: Parts,
    computed_in: torch.dtype,
    check: CancelCheck | None = None,
) -> Iterator[Finding]:
    """What is wrong with the values of a layer.

    Args:
        shape: (out, in) of its weight.
        weight: as stored.
        scales: its other tensors by suffix, in the dtypes and shapes of the codec.
        computed_in: dtype in which ComfyUI computes the model.
        check: called for each slice; raise in it to cancel.
    """
    values = {suffix: codec.scale_values(suffix, tensor, shape) for suffix, tensor in scales.items()}
    wrong = [(suffix, reason) for suffix, scale in values.items() if (reason := _scale_problem(codec, suffix, scale))]
    yield from (Finding(f"{layer}: {suffix} has {reason} values; {_AGAIN}.") for suffix, reason in wrong)
    largest = _largest_magnitude(weight, codec.magnitude_bits, check)
    if largest is not None and not torch.isfinite(largest):
        yield Finding(f"{layer}: its quantized values contain NaN or Inf; {_AGAIN}.")
    elif not wrong and (largest == 0 or not all(scale.any() for scale in values.values())):
        yield Finding(f"{layer}: all of its weights are zero; check the layer in the original.", fatal=False)
    elif not wrong and codec.cast_scale in values:
        yield from _check_cast(layer, codec.cast_scale, values[codec.cast_scale], largest, computed_in)


def check_fp8_values(
    name: str, tensor: torch.Tensor, *, scaled: bool, scale_expected: bool, check: CancelCheck | None = None
) -> Iterator[Finding]:
    """What is wrong with the values of an FP8 tensor without JSON.

    Args:
        scaled: it has a scale.
        scale_expected: it has none, and other layers of the file have.
    """
    largest = _largest_magnitude(tensor, 0x7F, check)
    if largest is None:
        return
    if not torch.isfinite(largest):
        yield Finding(f"{name}: contains NaN or Inf; make the file again from its full-precision original.")
    elif not scaled and tensor.dim() == 2 and largest > torch.finfo(tensor.dtype).max / 2:
        yield Finding(
            f"{name}: has values up to {float(largest):.0f} and no scale, as quantized values that lost theirs; "
            "download the file again.",
            fatal=scale_expected,
        )


def is_finite(tensor: torch.Tensor, check: CancelCheck | None = None) -> bool:
    """Whether a tensor of floats has neither NaN nor Inf."""
    for part in tensor.reshape(-1).split(_SLICE):
        if check:
            check()
        if not torch.isfinite(part).all():
            return False
    return True


def _scale_problem(codec: Codec, suffix: str, scale: torch.Tensor) -> str:
    """Which values of a scale no layer may have; empty where there are none."""
    if not torch.isfinite(scale).all():
        return "NaN or infinite"
    if suffix not in codec.signed and (scale < 0).any():
        return "negative"
    return "zero" if suffix in codec.positive and not scale.all() else ""


def _check_cast(
    layer: str, suffix: str, scale: torch.Tensor, largest: torch.Tensor | None, dtype: torch.dtype
) -> Iterator[Finding]:
    """Whether the scale, and the largest weight, survive in the dtype that ComfyUI casts the scale to."""
    cast = scale.to(dtype)
    error = float((cast.float() / scale - 1).abs().max())
    name = str(dtype).removeprefix("torch.")
    if not error <= _TOLERANCE:
        lost = f"{suffix} {float(scale.max()):.3g} becomes {float(cast.max()):.3g}"
    elif largest is not None and not torch.isfinite((largest * scale.max()).to(dtype)):
        lost, error = f"its largest weight, {float(largest * scale.max()):.3g}, becomes Inf", 1.0
    else:
        return
    yield Finding(f"{layer}: {lost} in {name}, in which ComfyUI computes this model; {_AGAIN}.", fatal=error >= 1)


def _largest_magnitude(weight: torch.Tensor, bits: int, check: CancelCheck | None) -> torch.Tensor | None:
    """The value (float32) of largest magnitude of one-byte items, NaN and Inf above all; None where ``bits`` is 0.

    ``bits``: those of a byte that are zero for the values 0 and −0. Only FP8 values compare as their bytes do: for others
    the result is 0 for zeros alone, and finite.
    """
    if not bits or not weight.numel():
        return None
    largest = torch.zeros((), dtype=torch.uint8)
    for part in weight.reshape(-1).view(torch.uint8).split(_SLICE):
        if check:
            check()
        largest = torch.maximum(largest, (part & bits).max())
    return (largest.view(weight.dtype) if weight.dtype.is_floating_point else largest).float()
