"""Quantize a bank of experts: every expert as a layer of its own, stacked in the tensors of the bank."""

import math
from collections import Counter
from dataclasses import replace
from typing import NamedTuple

import torch

from .calibration import LayerStatistics
from .cancellation import CancelCheck
from .formats import Codec, QuantizedBank, QuantizedWeight
from .layer import Layer
from .quantize_layer import quantize_layer
from .rounding import RoundingConfig

__all__ = ["quantize_bank"]


class _Expert(NamedTuple):
    """What the report of a bank needs of an expert; ``norm``: ‖W‖."""

    norm: float
    weight_error: float
    gain: float | None
    output_error: float | None
    solver: str
    smallest_scale: float
    largest_scale: float
    note: str


def quantize_bank(
    weights: torch.Tensor,
    bias: torch.Tensor | None,
    statistics: LayerStatistics,
    codec: Codec,
    rounding: RoundingConfig,
    *,
    device: torch.device,
    seed: int = 0,
    check: CancelCheck | None = None,
    cpu_fallback: bool = True,
) -> QuantizedBank:
    """Quantize the experts one after the other. Memory: the bank as stored, on the CPU, and one expert on ``device``.

    Args:
        weights: (experts, out, in).
        bias: (experts, out), for the bias correction.
        statistics: of the activations of all experts.
        codec: of each expert, one that :meth:`~.formats.Codec.admits_bank`.
        device: device of the arithmetic.
        seed, check, cpu_fallback: as for :func:`quantize_layer`.

    Raises:
        QuantizationError: as :func:`quantize_layer`, for any of the experts.
    """
    if rounding.smoothing:
        rounding = replace(rounding, smoothing=None)  # see expert_bank.py: ComfyUI would not apply it
    parts: dict[str, torch.Tensor] = {}
    biases: list[torch.Tensor] = []
    experts: list[_Expert] = []
    corrected = False
    for index, weight in enumerate(weights):
        if check:
            check()
        layer = Layer(weight.to(device), None if bias is None else bias[index], statistics)
        made = quantize_layer(layer, [codec], rounding, seed=seed, check=check, cpu_fallback=cpu_fallback)
        for suffix, tensor in made.codec.store(made.solution).items():
            if suffix not in parts:
                parts[suffix] = torch.empty((len(weights), *tensor.shape), dtype=tensor.dtype)
            parts[suffix][index] = tensor
        if made.bias is not None:
            biases.append(made.bias)
            corrected |= made.bias is not layer.bias
        experts.append(_describe_expert(layer, made))
    error = math.hypot(*(expert.norm * expert.weight_error for expert in experts))
    return QuantizedBank(
        codec,
        tuple(weights.shape),
        parts,
        torch.stack(biases) if corrected else bias,
        solver=Counter(expert.solver for expert in experts).most_common(1)[0][0],
        weight_error=error / (math.hypot(*(expert.norm for expert in experts)) or 1.0),
        gain=_mean([expert.gain for expert in experts]),
        output_error=_mean([expert.output_error for expert in experts]),
        scale_range=(min(expert.smallest_scale for expert in experts), max(expert.largest_scale for expert in experts)),
        note="; ".join(filter(None, (f"bank of {len(experts)} experts", experts[0].note))),
    )


def _describe_expert(layer: Layer, made: QuantizedWeight) -> _Expert:
    smallest, largest = made.scale_range
    return _Expert(
        norm=float(layer.weight.float().norm()),
        weight_error=made.weight_error,
        gain=made.gain,
        output_error=made.output_error,
        solver=made.solver,
        smallest_scale=smallest,
        largest_scale=largest,
        note=made.note,
    )


def _mean(values: list[float | None]) -> float | None:
    """The mean of the known values; None where there are none."""
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known else None
