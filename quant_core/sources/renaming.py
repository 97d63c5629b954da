"""Sources under other tensor names: tensors renamed, joined along their rows, and reordered when they are read."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from ..errors import SourceError
from .shards import ShardedFiles
from .source import CPU, TensorInfo
from .tensor_file import TensorFile

__all__ = ["Assembly", "RenamedSource"]


@dataclass(frozen=True)
class Assembly:
    """How a tensor is made of tensors of a file.

    Attributes:
        parts: names in the file; their tensors are concatenated along the first dimension.
        reorder: applied to the result, which keeps its dtype and shape; None for no change.
    """

    parts: tuple[str, ...]
    reorder: Callable[[torch.Tensor], torch.Tensor] | None = None


class RenamedSource:
    """The tensors of ``origin`` under other names. A context manager that closes ``origin``.

    Args:
        assemblies: new name → its parts. Tensors of ``origin`` that are no part of any are left out.

    Attributes:
        origin: the file, or a renamed one; its fingerprint counts.

    Raises:
        SourceError: tensors that are to be concatenated differ in dtype or row length.
    """

    def __init__(self, origin: "TensorFile | ShardedFiles | RenamedSource", assemblies: Mapping[str, Assembly]):
        self.origin = origin
        self.name, self.path, self.paths, self.size = origin.name, origin.path, origin.paths, origin.size
        self.metadata, self.layers = origin.metadata, getattr(origin, "layers", {})
        self._assemblies = assemblies
        self.tensors = {name: self._info(assembly) for name, assembly in assemblies.items()}

    def _info(self, assembly: Assembly) -> TensorInfo:
        first, *others = (self.origin.tensors[part] for part in assembly.parts)
        if not others:
            return first
        if any((other.dtype, other.shape[1:]) != (first.dtype, first.shape[1:]) for other in others) or not first.shape:
            raise SourceError(
                f"{self.name}: the tensors {', '.join(assembly.parts)} do not fit together; download it again."
            )
        return TensorInfo(first.dtype, (sum(info.shape[0] for info in (first, *others)), *first.shape[1:]))

    def read(self, name: str, device: torch.device = CPU) -> torch.Tensor:
        """Load one tensor onto ``device``."""
        parts, reorder = self._assemblies[name].parts, self._assemblies[name].reorder
        loaded = [self.origin.read(part, device) for part in parts]
        tensor = loaded[0] if len(loaded) == 1 else torch.cat(loaded)
        return reorder(tensor) if reorder else tensor

    def close(self) -> None:
        """Close the file."""
        self.origin.close()

    def __enter__(self) -> "RenamedSource":
        return self

    def __exit__(self, *exc) -> None:
        self.close()
