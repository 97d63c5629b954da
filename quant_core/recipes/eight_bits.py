"""Layers that take INT8 in a recipe of fewer bits: those that the format cannot hold, and those whose error weighs most."""

from collections.abc import Iterable, Mapping, Sequence

from ..formats import FormatConfig
from ..sources import TensorInfo
from .aliases import make_format
from .presets import Rule
from .roles import find_sensitive

__all__ = ["BANK_EIGHT_BITS", "EIGHT_BITS", "describe_uncalibrated", "explain_fallback", "find_eight_bits"]

EIGHT_BITS = make_format("int8")
BANK_EIGHT_BITS = make_format("int8", convrot=False)  # of banks of experts
_FEW = 4  # bits whose error is visible without a calibration
_EIGHT_BIT_ERROR = 0.0085  # relative error of INT8 weights per row, rotated, of Gaussian values
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
