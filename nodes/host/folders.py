"""ComfyUI's folders: which model files there are, where a file of ours goes, and under which name."""

import contextlib
import errno
import itertools
import logging
import os
import re
import time
from dataclasses import dataclass
from pathlib import Path

import comfy.model_management
import comfy.sd
import folder_paths

from ...quant_core.errors import OutputError, QuantizationError, SourceError
from ...quant_core.output import remove_leftovers
from ...quant_core.output.durable import flush_to_disk
from ...quant_core.sources import ShardedFiles

try:
    import fcntl
except ImportError:  # Windows, which removes no file that is open
    fcntl = None

__all__ = [
    "CHECKPOINTS",
    "DIFFUSION_MODELS",
    "TEXT_ENCODERS",
    "FileSource",
    "clip_types",
    "destination",
    "file_state",
    "model_files",
    "new_unfinished",
    "place",
    "safetensors_files",
    "remove",
    "stamp",
    "temporary",
    "temporary_folder",
    "without_folders",
]

log = logging.getLogger(__name__)


DIFFUSION_MODELS, CHECKPOINTS, TEXT_ENCODERS = "diffusion_models", "checkpoints", "text_encoders"
_KINDS = (DIFFUSION_MODELS, CHECKPOINTS, TEXT_ENCODERS)
_SAFETENSORS = (".safetensors", ".sft")
_INDEX = ".safetensors.index.json"
_SOURCES = (*_SAFETENSORS, _INDEX, ".gguf", ".ckpt", ".pt", ".pth", ".bin")
_SHARD = re.compile(r"-\d{5}-of-\d{5}\.\w+$")
# Up to the last part of an absolute path, on any system. A folder's name may hold spaces and quotes, not at its ends; a path ends before
# another one that begins after a space, and where the sentence goes on after a colon or semicolon.
_FOLDER = r"""[^\s'"/\\](?:(?:(?!\s[A-Za-z]:[/\\]|[:;]\s)[^\n/\\])*[^\s'"/\\])?[/\\]{1,2}"""
_FOLDERS = re.compile(rf"""(?<![\w.:/\\])(?:[A-Za-z]:)?[/\\]{{1,2}}(?:{_FOLDER})*(?=[^\s'"/\\])""")
_COPY = "learned_rounding_copy"  # .NAME.….partial: what is being copied
_ABANDONED = 86_400  # seconds after which nobody comes any more for a finished file that no node has
_CHUNK = 1 << 24  # bytes between two looks at whether the user cancelled


def model_files() -> list[str]:
    """ "folder/name" of every file that can be a source; shards by their index."""
    return [f"{kind}/{name}" for kind in _KINDS for name in _names(kind) if name.lower().endswith(_SOURCES)]


def safetensors_files() -> list[str]:
    """ "folder/name" of every safetensors file that is a model by itself."""
    return [f"{kind}/{name}" for kind in _KINDS for name in _names(kind) if name.lower().endswith(_SAFETENSORS)]


def _names(kind: str) -> list[str]:
    """The files in a model folder, those too that ComfyUI's own loaders do not take; no shard of a model."""
    found = (
        name
        for base in folder_paths.get_folder_paths(kind)
        for name in folder_paths.recursive_search(base, [".git"])[0]
    )
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
    """Changes when the file does; that of an index when a shard does."""
    return tuple(
        value for part in _parts(path) for status in [part.stat()] for value in (status.st_mtime_ns, status.st_size)
    )


def _parts(path: Path) -> tuple[Path, ...]:
    """The files that are read for a model: of an index, its shards too."""
    if path.name.lower().endswith(_INDEX):
        try:
            with ShardedFiles(path) as shards:
                return shards.paths
        except QuantizationError:  # who opens it says what is wrong
            pass
    return (path,)


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


def without_folders(text: str) -> str:
    """``text`` with paths inside ComfyUI's folders relative to these, and of other absolute paths the last part alone."""
    listed = [path for paths, *_ in folder_paths.folder_names_and_paths.values() for path in paths]
    kinds = (folder_paths.get_directory_by_type(kind) for kind in ("output", "input", "temp"))
    paths = map(Path, (*listed, *filter(None, kinds), folder_paths.models_dir, folder_paths.base_path))
    roots = {root for path in paths for root in (path.absolute(), path.resolve())}
    for root in sorted(roots, key=lambda root: -len(str(root))):
        text = text.replace(f"{root}{os.sep}", "").replace(str(root), root.name)
    return _FOLDERS.sub("", text)


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


def new_unfinished(stem: str) -> Path:
    """A name that no server has, in the folder of runs that are not finished; what a dead one left there under such a name goes."""
    folder = _unfinished_folder()
    long_ago = time.time() - _ABANDONED
    for path in folder.glob(f"{stem}_*{_SAFETENSORS[0]}"):
        with contextlib.suppress(OSError):
            if path.stat().st_mtime < long_ago:
                path.unlink()
    return folder / f"{stem}_{os.urandom(6).hex()}{_SAFETENSORS[0]}"


def _unfinished_folder() -> Path:
    """Beside ComfyUI's temp folder, so that runs outlive the server; that folder itself where nothing else can be written."""
    beside = temporary_folder().parent / ".learned_rounding"
    try:
        beside.mkdir(exist_ok=True)
    except OSError:
        return temporary_folder()
    return beside


def temporary(path: Path) -> Path:
    """``path``, a finished file, moved into ComfyUI's temp folder under a name of its own; nowhere when that fails."""
    moved = temporary_folder() / f"learned_rounding_{os.urandom(6).hex()}{path.suffix}"
    try:
        try:
            return path.rename(moved)
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
        log.info("%s lies on another disk than %s: the file is copied", moved.parent, path.parent)
        with open(path, "rb") as source, open(moved, "xb") as target:
            _copy_bytes(source, target)
        remove([path])
        return moved
    except BaseException as error:
        remove([path, moved])
        if isinstance(error, OSError):
            raise OutputError(
                f"The quantized model cannot be moved into ComfyUI's temp folder {moved.parent}: {error.strerror or error}; "
                "free some space there, or start ComfyUI with --temp-directory."
            ) from error
        raise


def destination(base: Path, prefix: str) -> tuple[Path, str]:
    """The folder inside ``base`` and the start of the file name that a user's prefix means."""
    base, prefix = base.resolve(), prefix.strip().replace("\\", "/")
    try:
        target = (base / prefix).resolve()
    except (OSError, RuntimeError, ValueError):  # what no system takes for a name, as one with a zero byte
        target = base
    if not prefix or prefix.endswith("/") or not target.is_relative_to(base) or target == base:
        raise OutputError(f"'{prefix}' is no file name inside {base}; give a name, with folders before it if you like.")
    return target.parent, target.name


def place(path: Path, folder: Path, stem: str, suffix: str) -> Path:
    """Link ``path`` into ``folder`` under the first free number, or copy it where links are not possible."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        remove_leftovers(folder / _COPY)
        try:
            return _first_free(folder, stem, suffix, lambda target: os.link(path, target))
        except OSError as error:
            log.info("%s is copied into %s, because it cannot be linked there: %s", path, folder, error.strerror)
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
    """A copy, which has no name but a hidden one before it is whole and on the disk."""
    partial = folder / f".{_COPY}.{os.urandom(4).hex()}.partial"
    try:
        with open(path, "rb") as source, open(partial, "xb") as target:
            if fcntl:  # held as long as this process lives, by which the next one knows whether it does
                with contextlib.suppress(OSError):  # some network disks have no locks
                    fcntl.flock(target, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _copy_bytes(source, target)
            target.flush()
            flush_to_disk(target.fileno())
        return _first_free(folder, stem, suffix, lambda target: _name(partial, target))
    finally:
        partial.unlink(missing_ok=True)


def _copy_bytes(source, target) -> None:
    """All of one open file into another, unless the user cancels."""
    while chunk := source.read(_CHUNK):
        comfy.model_management.throw_exception_if_processing_interrupted()
        target.write(chunk)


def _name(partial: Path, target: Path) -> None:
    """Give a whole file its name. Raises FileExistsError where that is taken."""
    try:
        os.link(partial, target)
    except FileExistsError:
        raise
    except (
        OSError
    ):  # no links on this disk; its own programs could take the name in between, if they ran at this moment
        if target.exists():
            raise FileExistsError(target) from None
        partial.rename(target)
