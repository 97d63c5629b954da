"""Sharded safetensors models: several files and a JSON index of the tensors in them."""

import contextlib
import os
from pathlib import Path

import torch

from ..errors import SourceError
from .safetensors import SafetensorsFile, parse_bounded_json
from .source import CPU
from .tensor_file import MAX_HEADER, open_regular_file

__all__ = ["INDEX_SUFFIX", "ShardedFiles"]

INDEX_SUFFIX = ".index.json"


def _load_weight_map(path: Path) -> dict[str, str]:
    """Load {tensor name: file name} from an index."""
    try:
        with open_regular_file(path) as file:
            if os.fstat(file.fileno()).st_size > MAX_HEADER:
                raise ValueError(f"more than {MAX_HEADER:,} bytes")
            index = parse_bounded_json(file.read())
    except OSError as error:
        raise SourceError(f"{path} cannot be read: {error.strerror}; check the disk.", file=str(path)) from error
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{path} is not valid JSON ({error}); download it again.", file=str(path)) from None
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if (
        not isinstance(weight_map, dict)
        or not weight_map
        or not all(isinstance(file, str) for file in weight_map.values())
    ):
        raise SourceError(
            f"{path} has no weight_map of tensors to files; give the index of a sharded model.", file=str(path)
        )
    for file in weight_map.values():
        if file in (".", "..") or Path(file).name != file or set("\\\0") & set(file):
            raise SourceError(
                f"{path} refers to the file '{file}' outside its folder; download the index again.", file=str(path)
            )
    return weight_map


class ShardedFiles:
    """Safetensors shards and their index as one :class:`~.source.SampledSource`. A context manager.

    Args:
        path: the ``*.safetensors.index.json``.

    Attributes:
        paths: the index and all shards.
        size: bytes of all shards.

    Raises:
        SourceError: the index or a shard is damaged, or the index refers to another folder or to tensors missing from the shards.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self.name = self.path.name.removesuffix(INDEX_SUFFIX)
        self._stack = contextlib.ExitStack()
        weight_map = _load_weight_map(self.path)
        try:
            shards = {
                file: self._stack.enter_context(SafetensorsFile(self.path.parent / file))
                for file in sorted(set(weight_map.values()))
            }
            for name, file in weight_map.items():
                if name not in shards[file].tensors:
                    raise SourceError(
                        f"{self.path} assigns tensor {name} to {file}, which does not contain it; download both again.",
                        file=str(self.path),
                        tensor=name,
                    )
        except BaseException:
            self._stack.close()
            raise
        self._shards = {name: shards[file] for name, file in weight_map.items()}
        self.paths = (self.path, *(shard.path for shard in shards.values()))
        self.size = sum(shard.size for shard in shards.values())
        self.metadata = {key: value for shard in shards.values() for key, value in shard.metadata.items()}
        self.tensors = {
            name: info
            for shard in shards.values()
            for name, info in shard.tensors.items()
            if self._shards.get(name) is shard
        }

    def read(self, name: str, device: torch.device = CPU) -> torch.Tensor:
        """Load one tensor onto ``device``."""
        return self._shards[name].read(name, device)

    def sample(self, name: str, offset: int, length: int) -> bytes:
        """Return ``length`` bytes of a tensor, starting at byte ``offset`` of its contiguous memory."""
        return self._shards[name].sample(name, offset, length)

    def close(self) -> None:
        """Close all shards."""
        self._stack.close()

    def __enter__(self) -> "ShardedFiles":
        return self

    def __exit__(self, *exc) -> None:
        self.close()
