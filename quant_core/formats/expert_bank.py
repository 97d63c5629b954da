"""Banks of experts: the matrices of a mixture-of-experts layer, stacked in one tensor.

A bank is E layers in one codec: each of its tensors has one more side in front, of length E. This is the layout of the
state dict of ComfyUI's ``MoEExperts``, which takes the matrix of an expert by the index of its tensors, and nothing else of
a linear layer: neither ``input_scale`` nor ``pre_quant_scale``.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from .codec import Codec, Parts, TensorSpec
from .layer_json import CONFIG_KEY, EXPERTS_KEY, config_tensor

__all__ = ["PartFinder", "QuantizedBank", "count_experts", "describe_matrix", "expert_parts", "find_parts"]

PartFinder = Callable[[str], TensorSpec | None]
"""Suffix → dtype and shape of a layer's tensor; None where it is missing."""


def count_experts(layer: str, config: Mapping[str, object], tensors: Mapping) -> int | None:
    """Number of experts of the layer whose JSON is ``config``; None for one that is not a bank."""
    weight = tensors.get(f"{layer}.weight")
    if weight is None or len(weight.shape) != 3 or config.get(EXPERTS_KEY) != weight.shape[0]:
        return None
    return weight.shape[0]


def describe_matrix(found, experts: int | None) -> TensorSpec:
    """dtype and shape of a layer's tensor ``found``, or of its part for one expert: without the first side; a scalar as it is.

    Args:
        experts: see :func:`count_experts`. A tensor with another first side is described whole, and so fits no codec.
    """
    shape = tuple(found.shape)
    return TensorSpec(found.dtype, shape[1:] if experts and shape[:1] == (experts,) else shape)


def find_parts(layer: str, tensors: Mapping, experts: int | None) -> PartFinder:
    """:func:`describe_matrix` of the tensors of a layer; ``tensors``: name → anything with ``dtype`` and ``shape``."""

    def find(suffix: str) -> TensorSpec | None:
        found = tensors.get(f"{layer}.{suffix}")
        return None if found is None else describe_matrix(found, experts)

    return find


def expert_parts(parts: Parts, expert: int) -> dict[str, torch.Tensor]:
    """The tensors of one expert; a scalar is that of all experts, as for ComfyUI."""
    return {suffix: tensor[expert] if tensor.dim() else tensor for suffix, tensor in parts.items()}


@dataclass(frozen=True)
class QuantizedBank:
    """A quantized bank, and the errors of its experts in one number each.

    Attributes:
        codec: how each of its matrices is stored.
        shape: (experts, out, in) of the original weight.
        parts: the stacked tensors by suffix, on the CPU; its JSON and bias are not among them.
        bias: (experts, out), corrected; None where none was given.
        solver: the solver of most experts.
        weight_error: ‖Ŵ − W‖/‖W‖ of the whole bank.
        gain, output_error: mean of the experts'; None where they have none.
        scale_range: smallest and largest scale.
        note: one sentence for users.
    """

    codec: Codec
    shape: tuple[int, ...]
    parts: Parts
    bias: torch.Tensor | None
    solver: str
    weight_error: float
    gain: float | None
    output_error: float | None
    scale_range: tuple[float, float]
    note: str = ""

    @property
    def config(self) -> dict[str, object]:
        """The bank's JSON."""
        return self.codec.file_config(self.shape)

    def tensors(self, layer: str) -> dict[str, torch.Tensor]:
        """{name: tensor} exactly as in a file, for a bank of base name ``layer``."""
        bias = {} if self.bias is None else {"bias": self.bias}
        parts = {**self.parts, CONFIG_KEY: config_tensor(self.config), **bias}
        return {f"{layer}.{suffix}": tensor for suffix, tensor in parts.items()}
