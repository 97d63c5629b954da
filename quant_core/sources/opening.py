"""Open a model as a source, by the content of its files: safetensors, PyTorch pickle, GGUF; whole, or in several files."""

import os
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path
from typing import TypeVar

from ..errors import MissingPackageError, SourceError
from .diffusers_names import assemble_diffusers
from .kinds import GGUF, JSON, LEGACY_PICKLE, SAFETENSORS, ZIP, Kind, find_kind, read_head, refuse_kind
from .llama_cpp_names import assemble_llama_cpp
from .renaming import Assembly, RenamedSource
from .safetensors import SafetensorsFile
from .shards import ShardedFiles, find_index, find_parts, load_weight_map, model_key, require_files
from .source import Source
from .tensor_file import WHOLE, Part, TensorFile
from .torch_pickle import PickleFile
from .wrapper_names import assemble_unwrapped

__all__ = ["convert_names", "model_paths", "open_safetensors", "open_source"]

AnySource = TypeVar("AnySource", bound=Source)

# What a folder may contain, in the order of preference: one of the first kind that it has.
_IN_FOLDER = (
    ("*.safetensors.index*.json", "safetensors indexes"),
    ("*.safetensors", "safetensors files and no index"),
    ("*.sft", ".sft files and no index"),
    ("*.index*.json", "indexes"),
    ("*.bin", ".bin files and no index"),
    ("*.gguf", "GGUF files"),
)


def _find_in_folder(folder: Path) -> Path:
    """Return the model of a folder: its index, its only file, or the first of its only set of parts."""
    for pattern, what in _IN_FOLDER:
        # macOS writes a file ._NAME beside each file on disks of other systems
        found = sorted(path for path in folder.glob(pattern) if not path.name.startswith("."))
        models = {model_key(path.name) for path in found}
        if len(models) == 1:
            return found[0]
        if models:
            raise SourceError(
                f"{folder} contains {len(models)} {what}; give one file, or the index of its shards.", file=str(folder)
            )
    if (folder / "model_index.json").exists():
        parts = sorted({path.parent.name for kind in ("safetensors", "bin") for path in folder.glob(f"*/*.{kind}")})
        raise SourceError(
            f"{folder} is a diffusers pipeline; give the folder of one model in it: {', '.join(parts) or 'none found'}.",
            file=str(folder),
        )
    raise SourceError(
        f"{folder} contains no safetensors files; give one file, or the index of its shards.", file=str(folder)
    )


def _open_gguf(path: Path, part: Part) -> TensorFile:
    try:
        from .gguf import GGUFFile
    except ImportError:
        raise MissingPackageError(
            f"{path} cannot be read without the package gguf: run 'pip install gguf' in ComfyUI's Python, or give the original "
            "safetensors file.",
            file=str(path),
        ) from None
    return GGUFFile(path, part)


_READERS: dict[Kind, Callable[[Path, Part], TensorFile]] = {
    SAFETENSORS: lambda path, part: SafetensorsFile(path),
    ZIP: lambda path, part: PickleFile(path),
    LEGACY_PICKLE: lambda path, part: PickleFile(path),
    GGUF: _open_gguf,
}


# From the names in a file to ComfyUI's, in this order.
_CONVERSIONS: tuple[Callable[[Source], dict[str, Assembly] | None], ...] = (
    assemble_unwrapped,
    assemble_diffusers,
    assemble_llama_cpp,
)


def _open_file(kinds: Collection[Kind], path: Path, part: Part = WHOLE) -> TensorFile:
    """Open one file of one of these kinds."""
    head = read_head(path)
    kind = find_kind(head)
    if kind not in kinds:
        raise refuse_kind(path, head)
    return _READERS[kind](path, part)


def _open_index(path: Path, kinds: Collection[Kind], what: str) -> ShardedFiles:
    weight_map = load_weight_map(path)
    files = [path.with_name(file) for file in sorted(set(weight_map.values()))]
    require_files(path, files, what)
    listed = set(files)
    if missing := next((part.name for part in find_parts(files[0]) if part not in listed), None):
        raise SourceError(
            f"{path} does not list {missing}, which the name of {files[0].name} implies; download the index again.",
            file=str(path),
        )
    return ShardedFiles(path, files, partial(_open_file, kinds), weight_map)


def _open_model(path: Path, kinds: Collection[Kind]) -> TensorFile | ShardedFiles:
    if os.path.isdir(path):  # Path.is_dir raises on a name that is too long
        path = _find_in_folder(path)
    head = read_head(path)
    if find_kind(head) is JSON:
        return _open_index(path, kinds, "is an index")
    if index := find_index(path):
        return _open_index(index, kinds, f"lists {path.name} as one of several shards")
    parts = find_parts(path)
    if len(parts) == 1:
        return _open_file(kinds, path)
    require_files(path, parts, f"is one of {len(parts)} parts of a model")
    return ShardedFiles(path, parts, partial(_open_file, kinds))


def open_safetensors(path: str | os.PathLike) -> TensorFile | ShardedFiles:
    """Open a safetensors file, the index of sharded files, one of them, or a folder that contains any of these.

    Raises:
        SourceError: the path is another kind of file, a shard is missing, or a file is damaged.
    """
    return _open_model(Path(path), (SAFETENSORS,))


def open_source(path: str | os.PathLike) -> TensorFile | ShardedFiles | RenamedSource:
    """Open a model of safetensors files, PyTorch pickles or GGUF files, as :func:`open_safetensors` does; suffixes do not matter.

    Tensors under names that ComfyUI does not read get ComfyUI's names where this package has a conversion; those of a
    quantized file get them when it is dequantized.

    Raises:
        SourceError: the path is another kind of file, a shard is missing, a file is damaged, or some of its tensors have no
            conversion.
        MissingPackageError: a GGUF file, and the package ``gguf`` is not installed.
    """
    opened = _open_model(Path(path), _READERS)
    try:
        return convert_names(opened)
    except BaseException:
        opened.close()
        raise


def convert_names(source: AnySource) -> AnySource | RenamedSource:
    """``source`` under ComfyUI's tensor names, where this package has a conversion, else itself.

    Raises:
        SourceError: some of its tensors have no conversion.
    """
    converted: AnySource | RenamedSource = source
    for assemble in _CONVERSIONS:
        if assemblies := assemble(converted):
            converted = RenamedSource(converted, assemblies)
    return converted


def model_paths(path: Path) -> tuple[Path, ...]:
    """The files that a model is read from, the given one among them, without opening them as models; some may be missing."""
    with_index = path if path.name.endswith(".json") else find_index(path)
    if with_index is None:
        return tuple(find_parts(path))
    files = {path.with_name(file) for file in load_weight_map(with_index).values()}
    return (with_index, *sorted(files))
