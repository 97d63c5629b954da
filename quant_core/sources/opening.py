"""Open a model file as a source by its kind: safetensors, sharded safetensors, PyTorch pickle, GGUF."""

import os
from collections.abc import Callable
from pathlib import Path

from ..errors import MissingPackageError, SourceError
from .diffusers_names import assemble_diffusers
from .llama_cpp_names import assemble_llama_cpp
from .renaming import RenamedSource
from .safetensors import SafetensorsFile
from .shards import INDEX_SUFFIX, ShardedFiles
from .tensor_file import TensorFile
from .torch_pickle import PickleFile

__all__ = ["open_safetensors", "open_source"]


def _find_in_folder(folder: Path) -> Path:
    """Return the index of a folder, or its only safetensors file."""
    found = sorted(folder.glob(f"*{INDEX_SUFFIX}")) or sorted(folder.glob("*.safetensors"))
    if len(found) == 1:
        return found[0]
    if (folder / "model_index.json").exists():
        parts = sorted({path.parent.name for path in folder.glob("*/*.safetensors")})
        raise SourceError(
            f"{folder} is a diffusers pipeline; give the folder of one model in it: {', '.join(parts) or 'none found'}.",
            file=str(folder),
        )
    missing = " and no index" if found else ""
    raise SourceError(
        f"{folder} contains {len(found) or 'no'} safetensors files{missing}; give one file, or the index of its shards.",
        file=str(folder),
    )


def _open_gguf(path: Path) -> TensorFile:
    try:
        from .gguf import GGUFFile
    except ImportError:
        raise MissingPackageError(
            f"{path} cannot be read without the package gguf: run 'pip install gguf' in ComfyUI's Python, or give the original "
            "safetensors file.",
            file=str(path),
        ) from None
    return GGUFFile(path)


_OPENERS: dict[str, Callable[[Path], TensorFile]] = {
    ".gguf": _open_gguf,
    **dict.fromkeys((".ckpt", ".pt", ".pth", ".bin"), PickleFile),
}


def open_safetensors(path: str | os.PathLike) -> SafetensorsFile | ShardedFiles:
    """Open a safetensors file, the index of sharded files, or a folder that contains either.

    Raises:
        SourceError: the path is none of these, or a file is damaged.
    """
    path = Path(path)
    if os.path.isdir(path):  # Path.is_dir raises on a name that is too long
        path = _find_in_folder(path)
    return (ShardedFiles if path.name.endswith(INDEX_SUFFIX) else SafetensorsFile)(path)


def open_source(path: str | os.PathLike) -> TensorFile | ShardedFiles | RenamedSource:
    """Open a PyTorch pickle or a GGUF file by its suffix, and any other path as :func:`open_safetensors` does.

    Tensors under names that ComfyUI does not read get ComfyUI's names where this package has a conversion.

    Raises:
        SourceError: the path is none of these, a file is damaged, or some of its tensors have no conversion.
        MissingPackageError: a GGUF file, and the package ``gguf`` is not installed.
    """
    path = Path(path)
    opener = None if os.path.isdir(path) else _OPENERS.get(path.suffix.lower())
    opened = opener(path) if opener else open_safetensors(path)
    try:
        assemblies = assemble_diffusers(opened) or assemble_llama_cpp(opened)
        return RenamedSource(opened, assemblies) if assemblies else opened
    except BaseException:
        opened.close()
        raise
