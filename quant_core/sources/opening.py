"""Models as they are published: a safetensors file, shards with an index, a folder of either, a pickle of weights, or GGUF."""

import contextlib
import os
from pathlib import Path

import torch

from ..errors import SourceError
from .gguf import GGUFFile
from .safetensors import MAX_HEADER, SafetensorsFile, StoredTensors, bounded_json, open_regular
from .source import CPU
from .torch_pickle import PickledWeights

__all__ = ["ShardedFiles", "open_safetensors", "open_source"]

_INDEX = ".index.json"


class ShardedFiles:
    """Safetensors shards and their index as one :class:`~.source.Source`. A context manager.

    Args:
        path: the ``….safetensors.index.json``.

    Raises:
        SourceError: the index is damaged, leads out of its folder, or names tensors that its shards do not hold.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self.name = self.path.name.removesuffix(_INDEX)
        self._stack = contextlib.ExitStack()
        places = _weight_map(self.path)
        try:
            files = {
                file: self._stack.enter_context(SafetensorsFile(self.path.parent / file))
                for file in sorted(set(places.values()))
            }
            self._files = {name: files[file] for name, file in places.items()}
            for name, file in places.items():
                if name not in files[file].tensors:
                    raise SourceError(
                        f"{self.path} says that tensor {name} is in {file}, which does not hold it; fetch both again."
                    )
        except BaseException:
            self._stack.close()
            raise
        self.paths = (self.path, *(file.path for file in files.values()))
        self.size = sum(file.size for file in files.values())
        self.metadata = {key: value for file in files.values() for key, value in file.metadata.items()}
        self.tensors = {
            name: info
            for file in files.values()
            for name, info in file.tensors.items()
            if self._files.get(name) is file
        }

    def read(self, name: str, device: torch.device = CPU) -> torch.Tensor:
        """The tensor on ``device``."""
        return self._files[name].read(name, device)

    def sample(self, name: str, offset: int, length: int) -> bytes:
        """``length`` bytes of the tensor's memory from byte ``offset``."""
        return self._files[name].sample(name, offset, length)

    def close(self) -> None:
        """Close all shards."""
        self._stack.close()

    def __enter__(self) -> "ShardedFiles":
        return self

    def __exit__(self, *exc) -> None:
        self.close()


def _weight_map(path: Path) -> dict[str, str]:
    """{tensor: file name} of an index."""
    try:
        with open_regular(path) as file:
            if os.fstat(file.fileno()).st_size > MAX_HEADER:
                raise ValueError(f"more than {MAX_HEADER:,} bytes")
            index = bounded_json(file.read())
    except OSError as error:
        raise SourceError(f"{path} cannot be read: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{path} is not valid JSON ({error}); fetch it again.") from None
    places = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(places, dict) or not places or not all(isinstance(file, str) for file in places.values()):
        raise SourceError(f"{path} has no weight_map from tensors to files; give the index of a sharded model.")
    for file in places.values():
        if file in (".", "..") or Path(file).name != file or set("\\\0") & set(file):
            raise SourceError(f"{path} names the file '{file}', which is not in its own folder; the index is damaged.")
    return places


def _in_folder(folder: Path) -> Path:
    """The index or the one safetensors file of a folder."""
    found = sorted(folder.glob(f"*{_INDEX}")) or sorted(folder.glob("*.safetensors"))
    if len(found) == 1:
        return found[0]
    if (folder / "model_index.json").exists():
        parts = sorted(path.parent.name for path in folder.glob("*/*.safetensors"))
        raise SourceError(
            f"{folder} is a whole pipeline; give the folder of one part: {', '.join(dict.fromkeys(parts)) or 'none is there'}."
        )
    raise SourceError(
        f"{folder} holds {len(found) or 'no'} safetensors files{' and no index' if found else ''}; give one file, or the index of its shards."
    )


_FILES = dict.fromkeys((".ckpt", ".pt", ".pth", ".bin"), PickledWeights) | {".gguf": GGUFFile}  # others are safetensors


def open_safetensors(path: str | os.PathLike) -> SafetensorsFile | ShardedFiles:
    """Open a safetensors file, an index of shards or a folder that holds either.

    Raises:
        SourceError: it is none of these.
    """
    path = Path(path)
    if os.path.isdir(path):  # unlike Path's own, False too for a name that no disk takes
        path = _in_folder(path)
    return (ShardedFiles if path.name.endswith(_INDEX) else SafetensorsFile)(path)


def open_source(path: str | os.PathLike) -> StoredTensors | ShardedFiles:
    """The same, and pickles of weights and GGUF.

    Raises:
        SourceError: it is none of these.
    """
    path = Path(path)
    known = None if os.path.isdir(path) else _FILES.get(path.suffix.lower())
    return known(path) if known else open_safetensors(path)
