"""A source whose tensors are recorded by their checksums, to notice that it is changed in place."""

from collections.abc import Mapping
from typing import Any

import torch

from ..cancellation import CancelCheck
from ..errors import SourceError
from ..sources import Source, TensorInfo
from ..sources.checksum import tensor_checksum
from ..sources.source import CPU

__all__ = ["RecordedSource"]


class RecordedSource:
    """The :class:`~..sources.Source` of a run, with the checksum of each tensor that is read, computed on its device.

    A tensor may be decoded differently on another device, so checksums are compared on the same device only.
    """

    def __init__(self, source: Source):
        self._source = source
        self.name = source.name
        self._checksums: dict[tuple[str, torch.device], int] = {}

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return self._source.tensors

    @property
    def metadata(self) -> Mapping[str, str]:
        return self._source.metadata

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)

    def read(self, name: str, device: torch.device = CPU) -> torch.Tensor:
        """Load one tensor onto ``device``. Raises :class:`SourceError` if it was read before and had other bytes."""
        tensor = self._source.read(name, device)
        checksum = tensor_checksum(tensor)
        if self._checksums.setdefault((name, device), checksum) != checksum:
            raise SourceError(f"{self.name}: tensor {name} was changed while it was read; run again.", tensor=name)
        return tensor

    def checksum(self, name: str, device: torch.device) -> int:
        """Checksum of a tensor on that device; it is read if it was not read before."""
        if (name, device) not in self._checksums:
            self.read(name, device)
        return self._checksums[name, device]

    def check_unchanged(self, check: CancelCheck) -> None:
        """Read all recorded tensors again. Raises :class:`SourceError` if one has other bytes now."""
        for name, device in tuple(self._checksums):
            check()
            self.read(name, device)
