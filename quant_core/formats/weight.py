"""A quantized weight: the solution of the rounding, and the codec that stores it."""

from dataclasses import dataclass

import torch

from ..deprecated import renamed_attribute
from ..errors import QuantizationError
from .codec import Codec, Format
from .layer_json import CONFIG_KEY, config_tensor
from .solution import Solution

__all__ = ["QuantizedWeight"]


@dataclass(frozen=True)
class QuantizedWeight:
    """Ŵ, its errors and its tensors in a file.

    Attributes:
        solution: quantized values, scales and errors.
        codec: how the layer is stored.
        shape: shape of the original weight.
        bias: the corrected bias (out,) in its own dtype; None where none was given.
        input_scale: what ComfyUI divides the layer's activations by before it quantizes them; None for 1.
        note: one sentence for users, empty when there is nothing to report.
    """

    solution: Solution
    codec: Codec
    shape: tuple[int, ...]
    bias: torch.Tensor | None = None
    input_scale: float | None = None
    note: str = ""

    codes = renamed_attribute("codes", "qdata")
    rounded = renamed_attribute("rounded", "solution")

    @property
    def qdata(self) -> torch.Tensor:
        """Quantized values (out, in) in the element format's dtype."""
        return self.solution.qdata

    @property
    def scale(self) -> torch.Tensor:
        """Effective scales, float32 (*counts)."""
        return self.solution.scale

    @property
    def format(self) -> Format:
        """Entry of :data:`FORMATS`."""
        return self.codec.format

    @property
    def granularity(self) -> str:
        """What shares a scale."""
        return self.codec.granularity

    @property
    def scale_range(self) -> tuple[float, float]:
        """Smallest and largest scale."""
        smallest, largest = torch.stack(self.scale.aminmax()).tolist()
        return smallest, largest

    @property
    def solver(self) -> str:
        """The solver that chose the quantized values."""
        return self.solution.solver

    @property
    def gain(self) -> float | None:
        """The loss relative to that of round to nearest; None when nothing was compared."""
        return self.solution.gain

    @property
    def weight_error(self) -> float:
        """‖Ŵ − W‖/‖W‖."""
        return self.solution.weight_error

    @property
    def output_error(self) -> float | None:
        """√(tr(E·H·Eᵀ)/tr(W·H·Wᵀ)), None without a Hessian."""
        return self.solution.output_error

    @property
    def config(self) -> dict[str, object]:
        """The layer's JSON."""
        return self.codec.layer_config(self._matrix_shape)

    def dequantize(self) -> torch.Tensor:
        """Ŵ as float32, in the original's shape and basis."""
        space = self.codec.solve_space(self._matrix_shape)
        return self.codec.restore_weight(space.decode(self.qdata, self.solution.scale)).reshape(self.shape)

    def dequantize_in(self, dtype: torch.dtype) -> torch.Tensor:
        """Ŵ (out, in) as ComfyUI dequantizes it for a product in ``dtype``, on cards that cannot multiply the format."""
        if self.codec.cast_scale == "weight_scale":
            return self.qdata.to(dtype) * self.scale.to(dtype)
        return self.dequantize().reshape(self._matrix_shape).to(dtype)

    def tensors(self, layer: str) -> dict[str, torch.Tensor]:
        """{name: tensor} exactly as in a file, for a layer of base name ``layer``.

        Raises:
            QuantizationError: the weight is not a matrix, or the format cannot hold its shape.
        """
        reason = "only matrices can be stored" if len(self.shape) != 2 else self.codec.admits(self._matrix_shape)
        if reason:
            raise QuantizationError(
                f"{layer}: a weight of shape {self.shape} cannot be stored as {self.codec}: {reason}."
            )
        return {f"{layer}.{suffix}": tensor for suffix, tensor in self.parts().items()}

    def parts(self) -> dict[str, torch.Tensor]:
        """The tensors of a matrix in a file by the last part of their names."""
        tensors = self.codec.store(self.solution)
        if self.input_scale is not None:
            tensors["input_scale"] = torch.tensor(self.input_scale)
        tensors[CONFIG_KEY] = config_tensor(self.config)
        if self.bias is not None:
            tensors["bias"] = self.bias
        return tensors

    @property
    def _matrix_shape(self) -> tuple[int, int]:
        return self.qdata.shape[0], self.qdata.shape[1]
