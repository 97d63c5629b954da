"""Layers that take INT8 in a recipe of fewer bits: those that the format cannot hold, and those whose error weighs most."""

from collections.abc import Iterable, Mapping, Sequence

from ..formats import FormatConfig
from ..sources import TensorInfo
from .aliases import make_format
from .presets import Rule
from .roles import OUTSIDE, find_sensitive

__all__ = [
    "BANK_EIGHT_BITS",
    "EIGHT_BITS",
    "describe_uncalibrated",
    "explain_fallback",
    "find_eight_bits",
    "find_packed",
]

EIGHT_BITS = make_format("int8")
BANK_EIGHT_BITS = make_format("int8", convrot=False)  # of banks of experts
_FEW = 4  # bits whose error is visible without a calibration
_EIGHT_BIT_ERROR = 0.0085  # relative error of INT8 weights per row, rotated, of Gaussian values
_PACKED = "outside the blocks: ComfyUI reads sizes of the model from the shape of the weight, which fewer bits change"
_FULL = 8  # bits from which on no layer needs more


def explain_fallback(format: FormatConfig, shape: Sequence[int]) -> str | None:
    """Why a weight (out, in) or a bank (experts, out, in) takes another format; None where it can be stored in this one."""
    *bank, out, inner = shape
    codec = format.codec_for(inner)
    if bank and (reason := codec.admits_bank()):
        return reason
    reason = codec.admits((out, inner))
    return f"{format.name} cannot hold it: {reason}" if reason else None


def describe_uncalibrated(format: FormatConfig) -> str | None:
    """A warning for a run without a calibration in a format of 4 bits; None for formats whose error is small without one."""
    if format.measured or format.codec.weight_bits > _FEW:
        return None
    error = format.codec.format.uncalibrated_error
    assert error is not None
    return (
        f"{format.name} without a calibration: expect an error of about {error:.0%} in the output of each layer, "
        f"{error / _EIGHT_BIT_ERROR:.0f} times that of INT8; calibrate the model first, which more than halves it."
    )


def find_eight_bits(
    tensors: Mapping[str, TensorInfo], format: FormatConfig, rules: Mapping[str, Iterable[Rule]]
) -> dict[str, str]:
    """Name → reason to take 8 bits, of the weights in ``rules``; none for formats of 8 bits.

    Args:
        tensors: all tensors of a model or checkpoint.
        rules: weight to quantize → preset rules for formats below 8 bits, and the name that they are searched in.
    """
    if format.codec.weight_bits >= _FULL:
        return {}
    found = find_sensitive(tensors)
    for name, its_rules in rules.items():
        if reason := next((rule.reason for rule in its_rules), None):
            found.setdefault(name, reason)
    return {name: f"8 bits: {reason}" for name, reason in found.items() if name in rules}


def find_packed(tensors: Mapping[str, TensorInfo], formats: Mapping[str, FormatConfig | None]) -> dict[str, str]:
    """Name → reason to take 8 bits in spite of a layer rule: ComfyUI reads sizes of a model from the shapes of such weights.

    Args:
        tensors: all tensors of a model or checkpoint.
        formats: weight → format of its layer rule, None without one.
    """
    below = {name for name, format in formats.items() if format and format.codec.weight_bits < _FULL}
    if not below:
        return {}
    outside = {name for name, reason in find_sensitive(tensors).items() if reason == OUTSIDE}
    matrices = {name for name, info in tensors.items() if name.endswith(".weight") and len(info.shape) == 2}
    return dict.fromkeys(below & outside, _PACKED) if matrices - outside else {}  # else the model has no blocks
