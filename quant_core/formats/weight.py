"""A quantized weight: codes, scale, and how both stand in a file."""

import json
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from .table import Format

__all__ = ["QuantizedWeight", "config_tensor", "config_bytes"]


def config_bytes(config: Mapping[str, object]) -> bytes:
    """A layer's JSON in the one spelling this project writes."""
    return json.dumps(config, separators=(",", ":")).encode()


def config_tensor(config: Mapping[str, object]) -> torch.Tensor:
    """The uint8 tensor that stands in a file as ``<layer>.comfy_quant``."""
    return torch.frombuffer(bytearray(config_bytes(config)), dtype=torch.uint8)


@dataclass(frozen=True)
class QuantizedWeight:
    """Ŵ = scale · codes.

    Attributes:
        codes: (out, in), dtype of the format's grid.
        scale: float32; () for tensor granularity, (out, 1) for row.
        format: entry of :data:`FORMATS`.
        granularity: key of the format's granularities.
        weight_error: ‖Ŵ − W‖/‖W‖, 0 for an all-zero weight.
        full_precision_matmul: ask ComfyUI to decode the weight instead of multiplying codes.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    format: Format
    granularity: str
    weight_error: float
    full_precision_matmul: bool = False

    @property
    def config(self) -> dict[str, object]:
        """The layer's JSON."""
        return self.format.config(self.granularity, full_precision_matmul=self.full_precision_matmul)

    def dequantize(self) -> torch.Tensor:
        """Ŵ as float32, (out, in)."""
        return self.codes.float() * self.scale

    def tensors(self, layer: str) -> dict[str, torch.Tensor]:
        """{name: tensor} exactly as they stand in the file, for a layer of base name ``layer``."""
        return {
            f"{layer}.weight": self.codes,
            f"{layer}.weight_scale": self.scale,
            f"{layer}.comfy_quant": config_tensor(self.config),
        }
