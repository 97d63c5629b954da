"""ComfyUI's folders: which model files there are, where a file of ours goes, and under which name."""

import itertools
import logging
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import comfy.sd
import folder_paths

from ...quant_core.checkpoints.sources import files_of
from ...quant_core.errors import OutputError, SourceError

__all__ = [
    "CHECKPOINTS",
    "DIFFUSION_MODELS",
    "TEXT_ENCODERS",
    "FileSource",
    "clip_types",
    "destination",
    "file_state",
    "model_files",
    "place",
    "safetensors_files",
    "remove",
    "stamp",
    "temporary",
    "temporary_folder",
    "unfinished_folder",
]

log = logging.getLogger(__name__)


DIFFUSION_MODELS, CHECKPOINTS, TEXT_ENCODERS = "diffusion_models", "checkpoints", "text_encoders"
_KINDS = (DIFFUSION_MODELS, CHECKPOINTS, TEXT_ENCODERS)
_SAFETENSORS = (".safetensors", ".sft")
_SOURCES = (*_SAFETENSORS, ".safetensors.index.json", ".gguf", ".ckpt", ".pt", ".pth", ".bin")
_SHARD = re.compile(r"-\d{5}-of-\d{5}\.\w+$")


def model_files() -> list[str]:
    """ "folder/name" of every file that can be a source; shards by their index."""
    return [f"{kind}/{name}" for kind in _KINDS for name in _names(kind) if name.lower().endswith(_SOURCES)]


def safetensors_files() -> list[str]:
    """ "folder/name" of every safetensors file that is a model by itself."""
    return [f"{kind}/{name}" for kind in _KINDS for name in _names(kind) if name.lower().endswith(_SAFETENSORS)]


def _names(kind: str) -> list[str]:
    """The files in a model folder, those too that ComfyUI's own loaders do not take; no shard of a model."""
    found = (name for base in folder_paths.get_folder_paths(kind) for name in folder_paths.recursive_search(base, [".git"])[0])
    return sorted({name for name in found if not _SHARD.search(name)})


def clip_types() -> list[str]:
    """The choices of ComfyUI's own Load CLIP."""
    return [entry.name.lower() for entry in comfy.sd.CLIPType]


def _path(choice: str) -> Path:
    kind, _, name = choice.partition("/")
    path = folder_paths.get_full_path(kind, name) if kind in _KINDS and name else None
    if path is None:
        raise SourceError(
            f"There is no model file '{choice}' in ComfyUI's model folders; refresh the list and choose again."
        )
    return Path(path)


def file_state(choice: str) -> tuple[int, ...]:
    """Changes when the chosen file does, or a shard of it."""
    return stamp(_path(choice))


def stamp(path: Path) -> tuple[int, ...]:
    """Changes when the file does, or one of the shards that it is the index of."""
    found = (file.stat() for file in files_of(path) if file.exists())  # one that is missing is told when the model is read
    return tuple(number for status in found for number in (status.st_mtime_ns, status.st_size))


@dataclass(frozen=True)
class FileSource:
    """A model file that nothing has been read of yet.

    ``kind``: the model folder it is in; ``clip_type``: for text encoders; ``requantize``: decode it first if it is quantized.
    """

    path: Path
    kind: str
    clip_type: str
    requantize: bool = False

    @classmethod
    def choose(cls, choice: str, clip_type: str, requantize: bool = False) -> "FileSource":
        """From what :func:`model_files` lists."""
        return cls(_path(choice), choice.partition("/")[0], clip_type, requantize)


def remove(paths) -> None:
    """Delete files, or leave it to ComfyUI's next start."""
    for path in paths:
        try:
            path.unlink(missing_ok=True)
        except OSError:  # Windows: still mapped by a model; ComfyUI empties its temp folder when it starts
            log.debug("could not remove %s", path)


def temporary_folder() -> Path:
    """ComfyUI's own, which it empties when it starts."""
    folder = Path(folder_paths.get_temp_directory())
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def unfinished_folder() -> Path:
    """Beside ComfyUI's temp folder, so that runs outlive the server; that folder itself where nothing else can be written."""
    beside = temporary_folder().parent / ".learned_rounding"
    try:
        beside.mkdir(exist_ok=True)
    except OSError:
        return temporary_folder()
    return beside


def temporary(path: Path) -> Path:
    """``path``, a finished file, moved into ComfyUI's temp folder under a name of its own."""
    moved = temporary_folder() / f"learned_rounding_{os.urandom(6).hex()}{path.suffix}"
    shutil.move(path, moved)
    return moved


def destination(base: Path, prefix: str) -> tuple[Path, str]:
    """The folder inside ``base`` and the start of the file name that a user's prefix means."""
    base, prefix = base.resolve(), prefix.strip().replace("\\", "/")
    target = (base / prefix).resolve()
    if not prefix or prefix.endswith("/") or not target.is_relative_to(base) or target == base:
        raise OutputError(f"'{prefix}' is no file name inside {base}; give a name, with folders before it if you like.")
    return target.parent, target.name


def place(path: Path, folder: Path, stem: str, suffix: str) -> Path:
    """Link ``path`` into ``folder`` under the first free number, or copy it where links are not possible."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            return _first_free(folder, stem, suffix, lambda target: os.link(path, target))
        except OSError:
            return _copy(path, folder, stem, suffix)
    except OSError as error:
        raise OutputError(f"The model cannot be saved in {folder}: {error.strerror or error}.") from error


def _first_free(folder: Path, stem: str, suffix: str, take) -> Path:
    """The first numbered name that ``take`` creates without a FileExistsError."""
    for number in itertools.count(1):
        target = folder / f"{stem}_{number:05}_{suffix}"
        try:
            take(target)
            return target
        except FileExistsError:
            continue


def _copy(path: Path, folder: Path, stem: str, suffix: str) -> Path:
    partial = folder / f".{stem}.{os.urandom(4).hex()}.partial"
    try:
        with open(path, "rb") as source, open(partial, "xb") as target:
            shutil.copyfileobj(source, target, 1 << 24)
            target.flush()
            os.fsync(target.fileno())
        claimed = _first_free(folder, stem, suffix, lambda target: os.close(os.open(target, os.O_CREAT | os.O_EXCL)))
        return partial.replace(claimed)
    finally:
        partial.unlink(missing_ok=True)
