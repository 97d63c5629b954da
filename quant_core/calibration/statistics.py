"""Statistics of input activations: those of one layer, the calibration protocol, and a calibration in memory."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from ..deprecated import renamed_attribute
from ..errors import CalibrationError
from .hessian import Hessian, LowRankHessian, move_hessian

__all__ = ["Calibration", "InMemoryCalibration", "LayerStatistics", "StepSensitivity"]

StepSensitivity = tuple[tuple[float, float], ...]
"""(position, sensitivity) of the probes of a layer; position: of the call in a run of the sampler, 0…1."""


@dataclass(frozen=True)
class LayerStatistics:
    """Statistics of the input activations of one layer, in the basis of the original weight; None where not available.

    Attributes:
        hessian: H of the calibration activations.
        validation_hessian: H of the validation activations, which choose among solutions.
        mean: mean activation, (in,).
        amax: largest magnitude of each channel, (in,).
        histogram: counts of magnitudes, (bins,), see :mod:`.histogram`.
        sensitivity: relative squared error of the model's output per relative squared error of this layer's output,
            see :mod:`.sensitivity`.
    """

    hessian: Hessian | None = None
    validation_hessian: Hessian | None = None
    mean: torch.Tensor | None = None
    amax: torch.Tensor | None = None
    histogram: torch.Tensor | None = None
    sensitivity: float | None = None

    gram = renamed_attribute("gram", "hessian")
    holdout_gram = renamed_attribute("holdout_gram", "validation_hessian")

    @property
    def validation_activations(self) -> torch.Tensor | None:
        """Validation activations, float32 (tokens, in); None where only their Hessian is available."""
        hessian = self.validation_hessian
        if not isinstance(hessian, LowRankHessian) or hessian.diagonal.any():
            return None
        return (hessian.factor.t() * hessian.factor.shape[1] ** 0.5).float()

    @property
    def hessian_bytes(self) -> int:
        """Size of the Hessian as it is stored, in bytes."""
        if self.hessian is None:
            return 0
        parts = [self.hessian] if isinstance(self.hessian, torch.Tensor) else vars(self.hessian).values()
        return sum(part.nbytes for part in parts if isinstance(part, torch.Tensor))

    def move_hessian(self, device: torch.device) -> "LayerStatistics":
        """The same statistics with the Hessian on ``device``."""
        return self if self.hessian is None else replace(self, hessian=move_hessian(self.hessian, device))


class Calibration(Protocol):
    """Statistics of the layers of one model.

    Attributes:
        fingerprint: string that changes when the statistics change; None if it cannot be computed.
    """

    @property
    def fingerprint(self) -> str | None: ...

    def layer_statistics(self, layer: str) -> LayerStatistics | None:
        """Return the statistics of a layer; None if it is not calibrated.

        Args:
            layer: name of the layer's weight without ``.weight``.
        """
        ...

    def sensitivity(self, layer: str) -> float | None:
        """Return :attr:`LayerStatistics.sensitivity` of a layer without reading its tensors."""
        ...

    def step_sensitivity(self, layer: str) -> StepSensitivity | None:
        """Return the sensitivity of a layer at single steps of the sampler; None if it was not measured."""
        ...

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Check that a model with layers of these names and shapes (out, in) has all calibrated layers.

        Raises:
            CalibrationError: a layer is missing or has another shape.
        """
        ...


class InMemoryCalibration:
    """A :class:`Calibration` in memory: layer → :class:`LayerStatistics`."""

    fingerprint: str | None = None

    def __init__(self, layers: Mapping[str, LayerStatistics]):
        self._layers = layers

    def layer_statistics(self, layer: str) -> LayerStatistics | None:
        return self._layers.get(layer)

    def sensitivity(self, layer: str) -> float | None:
        statistics = self._layers.get(layer)
        return None if statistics is None else statistics.sensitivity

    def step_sensitivity(self, layer: str) -> StepSensitivity | None:
        return None

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        for layer in self._layers:
            if layer not in shapes:
                raise CalibrationError(
                    f"The calibration has a layer {layer}, which the model does not have; calibrate this model."
                )
