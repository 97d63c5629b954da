"""Statistics of many layers' inputs, in memory or in a file."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from ..checkpoints import SafetensorsFile
from ..checkpoints.source import fingerprint
from ..errors import CalibrationError, SourceError
from .gram import Inputs, LowRankGram

__all__ = ["Calibration", "LayerInputs", "CalibrationFile"]

_KINDS = ("gram", "holdout_gram", "mean")


class Calibration(Protocol):
    """What is known of the inputs of a model's layers.

    Attributes:
        mark: changes when the statistics do; None when that cannot be told.
    """

    mark: str | None

    def inputs(self, layer: str) -> Inputs | None:
        """Of the layer of that base name (its weight's name without ``.weight``); None for unknown."""


class LayerInputs:
    """A calibration in memory: layer → :class:`Inputs`."""

    mark = None

    def __init__(self, layers: Mapping[str, Inputs]):
        self._layers = layers

    def inputs(self, layer: str) -> Inputs | None:
        return self._layers.get(layer)


class CalibrationFile:
    """A safetensors file, read layer by layer.

    Of each layer it may hold ``<layer>.gram`` and ``<layer>.holdout_gram``, (in, in) in any float dtype, either of
    them as ``….factor`` (in, rank) and ``….diagonal`` (in,) instead, and ``<layer>.mean`` (in,). A context.

    Raises:
        SourceError: the file is missing or is no safetensors file.
        CalibrationError: it holds no statistics.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self._file = SafetensorsFile(path)
        if not any(name.endswith((".gram", ".gram.factor")) for name in self._file.tensors):
            self._file.close()
            raise CalibrationError(f"{path} holds no Grams of layers, so it is no calibration; choose another file.")
        self.mark = fingerprint(self._file)

    def inputs(self, layer: str) -> Inputs | None:
        found = {kind: self._read(f"{layer}.{kind}") for kind in _KINDS}
        return Inputs(**found) if any(value is not None for value in found.values()) else None

    def _read(self, name: str):
        tensors = self._file.tensors
        if name in tensors:
            return self._file.read(name)
        parts = [f"{name}.factor", f"{name}.diagonal"]
        present = [part for part in parts if part in tensors]
        if not present:
            return None
        if present != parts:
            raise SourceError(f"{self.path}: {present[0]} has no counterpart; the file is damaged.")
        return LowRankGram(*(self._file.read(part) for part in parts))

    def __enter__(self) -> "CalibrationFile":
        return self

    def __exit__(self, *_) -> None:
        self._file.close()
