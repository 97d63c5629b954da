"""A quantized weight: codes, scale, and how both stand in a file."""

import json
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ..errors import QuantizationError
from .encoding import Encoding
from .table import Format

__all__ = ["QuantizedWeight", "Rounded", "config_tensor", "config_bytes"]


def config_bytes(config: Mapping[str, object]) -> bytes:
    """A layer's JSON in the one spelling this project writes."""
    return json.dumps(config, separators=(",", ":")).encode()


def config_tensor(config: Mapping[str, object]) -> torch.Tensor:
    """The uint8 tensor that stands in a file as ``<layer>.comfy_quant``."""
    return torch.frombuffer(bytearray(config_bytes(config)), dtype=torch.uint8)


@dataclass(frozen=True)
class Rounded:
    """How a weight was rounded, and what that cost.

    Attributes:
        winner: the solver whose codes were taken; "nearest" where no other was better.
        weight_error: ‖Ŵ − W‖/‖W‖, 0 for an all-zero weight.
        gain: what the rounding minimises, relative to nearest; below 1 is better, None when nothing was compared.
        output_error: √(tr(E·H·Eᵀ)/tr(W·H·Wᵀ)), None without a Gram H.
        note: one sentence for people, empty when there is nothing to say.
    """

    winner: str
    weight_error: float
    gain: float | None = None
    output_error: float | None = None
    note: str = ""


@dataclass(frozen=True)
class QuantizedWeight:
    """Ŵ = scale · codes, rotated back where the encoding rotates.

    Attributes:
        codes: (out, in), dtype of the format's grid.
        scale: float32; () for tensor granularity, (out, 1) for row, (⌈out/bs⌉, ⌈in/bs⌉) for block.
        encoding: how it stands in a file.
        rounded: how it was rounded.
        shape: shape of the original weight.
        bias: the corrected bias (out,), in the dtype it came in; None when there was none to correct.
        input_scale: what ComfyUI divides the layer's inputs by before it quantizes them; None for 1.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    encoding: Encoding
    rounded: Rounded
    shape: tuple[int, ...]
    bias: torch.Tensor | None = None
    input_scale: float | None = None

    @property
    def format(self) -> Format:
        """Entry of :data:`FORMATS`."""
        return self.encoding.format

    @property
    def granularity(self) -> str:
        """What shares a scale."""
        return self.encoding.granularity

    @property
    def weight_error(self) -> float:
        """‖Ŵ − W‖/‖W‖."""
        return self.rounded.weight_error

    @property
    def output_error(self) -> float | None:
        """√(tr(E·H·Eᵀ)/tr(W·H·Wᵀ)), None without a Gram."""
        return self.rounded.output_error

    @property
    def config(self) -> dict[str, object]:
        """The layer's JSON."""
        return self.encoding.config

    def dequantize(self) -> torch.Tensor:
        """Ŵ as float32, in the original's shape and basis."""
        return self.encoding.decode(self.codes, self.scale).reshape(self.shape)

    def tensors(self, layer: str) -> dict[str, torch.Tensor]:
        """{name: tensor} exactly as they stand in the file, for a layer of base name ``layer``."""
        if len(self.shape) != 2:
            raise QuantizationError(
                f"{layer}: a weight of shape {self.shape} cannot stand quantized in a file, only matrices can."
            )
        bias = {} if self.bias is None else {f"{layer}.bias": self.bias}
        inputs = {} if self.input_scale is None else {f"{layer}.input_scale": torch.tensor(self.input_scale)}
        return {
            f"{layer}.weight": self.codes,
            f"{layer}.weight_scale": self.scale,
            **inputs,
            f"{layer}.comfy_quant": config_tensor(self.config),
            **bias,
        }
