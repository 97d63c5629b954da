"""Sources under other tensor names: tensors renamed, joined along their rows, and reordered when they are read."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from ..errors import SourceError
from .gguf_shapes import restore_shape
from .shards import ShardedFiles
from .source import CPU, Source, TensorInfo
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
    """The tensors of ``origin`` under other names. A context manager that closes ``origin`` if that is a file.

    Args:
        assemblies: new name → its parts. Tensors of ``origin`` that are no part of any are left out.

    Attributes:
        origin: the file, or the decoded or renamed source; its fingerprint counts.
        paths: files that it is read from.

    Raises:
        SourceError: tensors that are to be concatenated differ in dtype or row length.
    """

    def __init__(self, origin: Source, assemblies: Mapping[str, Assembly]):
        self.origin = origin
        self.name, self.paths = origin.name, getattr(origin, "paths", ())
        self.metadata, self.layers = origin.metadata, getattr(origin, "layers", {})
        self._assemblies = assemblies
        self.tensors = {name: self._info(name, assembly) for name, assembly in assemblies.items()}

    def _info(self, name: str, assembly: Assembly) -> TensorInfo:
        first, *others = (self.origin.tensors[part] for part in assembly.parts)
        if not others:  # the dimensions that a GGUF file lacks are known by the new name
            return TensorInfo(first.dtype, restore_shape(name, first.shape))
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
        return (reorder(tensor) if reorder else tensor).view(self.tensors[name].shape)

    def close(self) -> None:
        """Close the file; a decoded source is closed with its own file."""
        if isinstance(self.origin, (TensorFile, ShardedFiles)):
            self.origin.close()

    def __enter__(self) -> "RenamedSource":
        return self

    def __exit__(self, *exc) -> None:
        self.close()
