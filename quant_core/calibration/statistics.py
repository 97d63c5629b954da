"""What is known of a model's layers, in memory or in a file."""

from collections.abc import Mapping
from typing import Protocol

from ..errors import CalibrationError
from .hessian import Inputs

__all__ = ["Calibration", "LayerInputs"]


class Calibration(Protocol):
    """What is known of the inputs of a model's layers.

    Attributes:
        mark: changes when the statistics do; None when that cannot be told.
    """

    mark: str | None

    def inputs(self, layer: str) -> Inputs | None:
        """Of the layer of that base name (its weight's name without ``.weight``); None for unknown."""

    def sensitivity_of(self, layer: str) -> float | None:
        """:attr:`~.gram.Inputs.sensitivity` of a layer, without reading the rest."""

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Raise :class:`CalibrationError` unless it is of a model with layers of these names and shapes (out, in)."""


class LayerInputs:
    """A calibration in memory: layer → :class:`Inputs`."""

    mark = None

    def __init__(self, layers: Mapping[str, Inputs]):
        self._layers = layers

    def inputs(self, layer: str) -> Inputs | None:
        return self._layers.get(layer)

    def sensitivity_of(self, layer: str) -> float | None:
        known = self._layers.get(layer)
        return known and known.sensitivity

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        for layer in self._layers:
            if layer not in shapes:
                raise CalibrationError(f"The calibration knows a layer {layer}, which the model does not have.")
