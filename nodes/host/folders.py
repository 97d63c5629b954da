"""ComfyUI's folders: model files in them, and folders and names for files of this pack."""

import contextlib
import errno
import functools
import itertools
import logging
import os
import re
import time
from collections.abc import Callable, Container, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import comfy.model_management
import comfy.sd
import folder_paths

from ...quant_core.errors import OutputError, QuantizationError, SourceError
from ...quant_core.file_system import remove_file
from ...quant_core.output import check_disk_space, check_name, lock_file, remove_leftovers
from ...quant_core.output.durable import flush_to_disk
from ...quant_core.sources import model_paths
from ...quant_core.sources.shards import model_key, model_stem, part_number

__all__ = [
    "CHECKPOINTS",
    "DIFFUSION_MODELS",
    "SOURCE_SUFFIXES",
    "TEXT_ENCODERS",
    "FileSource",
    "choice_stamp",
    "clip_types",
    "file_stamp",
    "forget_file_list",
    "model_files",
    "move_to_temp",
    "new_unfinished",
    "place_file",
    "remove_files",
    "resolve_prefix",
    "safetensors_files",
    "shorten_paths",
    "temporary_folder",
]

log = logging.getLogger(__name__)


DIFFUSION_MODELS, CHECKPOINTS, TEXT_ENCODERS = "diffusion_models", "checkpoints", "text_encoders"
_KINDS = (DIFFUSION_MODELS, CHECKPOINTS, TEXT_ENCODERS)
_SAFETENSORS = (".safetensors", ".sft")
_INDEXES = (".safetensors.index.json", ".bin.index.json")
SOURCE_SUFFIXES = (*_SAFETENSORS, *_INDEXES, ".gguf", ".ckpt", ".pt", ".pth", ".bin")
# The folders of an absolute path, on any system. The name of a folder may contain spaces and quotes, except as its first and
# last character. A path ends before another path that follows a space, and before a colon or semicolon with a space.
_FOLDER = r"""[^\s'"/\\](?:(?:(?!\s[A-Za-z]:[/\\]|[:;]\s)[^\n/\\])*[^\s'"/\\])?[/\\]{1,2}"""
_FOLDERS = re.compile(rf"""(?<![\w.:/\\])(?:[A-Za-z]:)?[/\\]{{1,2}}(?:{_FOLDER})*(?=[^\s'"/\\])""")
_COPY = "learned_rounding_copy"  # .NAME.….partial: a copy in progress
_ABANDONED = 86_400  # s; a finished file of that age belongs to a server that stopped
_CHUNK = 1 << 24  # bytes between checks for an interrupt


def model_files() -> list[str]:
    """Every file that can be a source, as "folder/name"; a sharded model by its index file, without one by its first part."""
    return [f"{kind}/{name}" for kind in _KINDS for name in _names(kind) if name.lower().endswith(SOURCE_SUFFIXES)]


def safetensors_files() -> list[str]:
    """Every safetensors file that is a whole model, as "folder/name"."""
    return [
        f"{kind}/{name}"
        for kind in _KINDS
        for name in _names(kind)
        if name.lower().endswith(_SAFETENSORS) and part_number(_split(name)[1]) is None
    ]


def _split(name: str) -> tuple[str, str]:
    """Folder and file name of a model file."""
    folder, _, file = name.replace("\\", "/").rpartition("/")
    return folder, file


def _names(kind: str) -> list[str]:
    """The files in a model folder, of a model in several parts the index, else the first part.

    Includes file types that ComfyUI's own loaders do not accept.
    """
    names = sorted(
        {
            name
            for base in folder_paths.get_folder_paths(kind)
            for name in folder_paths.recursive_search(base, [".git"])[0]
        }
    )
    split = {name: _split(name) for name in names}
    indexed = {(folder, model_stem(file)) for folder, file in split.values() if file.lower().endswith(_INDEXES)}
    first: dict[tuple[str, ...], str] = {}
    for name, (folder, file) in split.items():
        first.setdefault((folder, *model_key(file)), name)
    return [name for name in first.values() if _is_listed(*split[name], indexed)]


def _is_listed(folder: str, file: str, indexed: Container[tuple[str, str]]) -> bool:
    """Whether a file is listed as a model: it is a whole one, or the first part of one without an index."""
    number = part_number(file)
    return number is None or (number < 2 and (folder, model_stem(file)) not in indexed)


def clip_types() -> list[str]:
    """The types of ComfyUI's Load CLIP."""
    return [entry.name.lower() for entry in comfy.sd.CLIPType]


def _find_file(choice: str) -> Path:
    """The path of "folder/name". Raises SourceError where there is no such file."""
    kind, _, name = choice.partition("/")
    path = folder_paths.get_full_path(kind, name) if kind in _KINDS and name else None
    if path is None:
        raise SourceError(
            f"Model file '{choice}' is not in ComfyUI's model folders; refresh the list and choose again."
        )
    return Path(path)


def choice_stamp(choice: str) -> tuple[int, ...]:
    """:func:`file_stamp` of "folder/name"."""
    return file_stamp(_find_file(choice))


def file_stamp(path: Path) -> tuple[int, ...]:
    """Modification times (ns) and sizes (bytes) of a file, or of all shards of an index file."""
    return tuple(
        value
        for part in _model_parts(path)
        for status in [part.stat()]
        for value in (status.st_mtime_ns, status.st_size)
    )


def _model_parts(path: Path) -> tuple[Path, ...]:
    """The files of a model that exist: for an index file its shards, for a shard or a part of a GGUF its neighbours."""
    try:
        return (path, *(part for part in model_paths(path) if part != path and part.exists()))
    except QuantizationError:  # reported when the file is opened
        return (path,)


@dataclass(frozen=True)
class FileSource:
    """A model file that is not open yet.

    Attributes:
        kind: its model folder.
        clip_type: type of Load CLIP for text encoders.
        requantize: dequantize it first if it is quantized.
    """

    path: Path
    kind: str
    clip_type: str
    requantize: bool = False

    @classmethod
    def choose(cls, choice: str, clip_type: str, requantize: bool = False) -> "FileSource":
        """The source of an entry of :func:`model_files`."""
        return cls(_find_file(choice), choice.partition("/")[0], clip_type, requantize)


def shorten_paths(text: str) -> str:
    """``text`` with paths in ComfyUI's folders relative to these folders, and other absolute paths without their folders."""
    listed = [path for paths, *_ in folder_paths.folder_names_and_paths.values() for path in paths]
    kinds = (folder_paths.get_directory_by_type(kind) for kind in ("output", "input", "temp"))
    paths = map(Path, (*listed, *filter(None, kinds), folder_paths.models_dir, folder_paths.base_path))
    roots = {root for path in paths for root in (path.absolute(), path.resolve())}
    for root in sorted(roots, key=lambda root: -len(str(root))):
        text = text.replace(f"{root}{os.sep}", "").replace(str(root), root.name)
    return _FOLDERS.sub("", text)


def remove_files(paths: Iterable[Path]) -> None:
    """Delete files; one that cannot be deleted now is left to ComfyUI's next start, which empties its temp folder."""
    for path in paths:
        if not remove_file(path):  # Windows: a model maps the file into memory
            log.debug("could not remove %s", path)


def temporary_folder() -> Path:
    """ComfyUI's temp folder, which it empties at its start."""
    folder = Path(folder_paths.get_temp_directory())
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def new_unfinished(stem: str) -> Path:
    """A new unique path in the folder of unfinished runs; deletes finished files there that servers abandoned."""
    folder = _unfinished_folder()
    oldest = time.time() - _ABANDONED
    for path in folder.glob(f"{stem}_*{_SAFETENSORS[0]}"):
        with contextlib.suppress(OSError):
            if path.stat().st_mtime < oldest:
                path.unlink()
    return folder / f"{stem}_{os.urandom(6).hex()}{_SAFETENSORS[0]}"


def _unfinished_folder() -> Path:
    """A folder beside ComfyUI's temp folder, so that runs survive a restart; the temp folder where it cannot be created."""
    beside = temporary_folder().parent / ".learned_rounding"
    try:
        beside.mkdir(exist_ok=True)
    except OSError:
        return temporary_folder()
    return beside


def move_to_temp(path: Path) -> Path:
    """Move a finished file into ComfyUI's temp folder under a unique name; returns its path. After an error it is deleted.

    Raises:
        OutputError: the file cannot be moved.
    """
    moved = temporary_folder() / f"learned_rounding_{os.urandom(6).hex()}{path.suffix}"
    try:
        try:
            return path.rename(moved)
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
        log.info("%s is on another disk than %s: copying the file", moved.parent, path.parent)
        with open(path, "rb") as source, open(moved, "xb") as target:
            _copy_bytes(source, target)
        remove_files([path])
        return moved
    except BaseException as error:
        remove_files([path, moved])
        if isinstance(error, OSError):
            raise OutputError(
                f"The quantized model cannot be moved into ComfyUI's temp folder {moved.parent}: {error.strerror or error}; "
                "free disk space there, or start ComfyUI with --temp-directory."
            ) from error
        raise


def forget_file_list(kind: str) -> None:
    """Make ComfyUI read the folders of that kind again when it next lists their files."""
    folder_paths.filename_list_cache.pop(kind, None)


def resolve_prefix(base: Path, prefix: str) -> tuple[Path, str]:
    """(folder, stem) of a user's file name prefix in ``base``. Raises OutputError unless the result is inside ``base``."""
    base, prefix = base.resolve(), prefix.strip().replace("\\", "/")
    try:
        target = (base / prefix).resolve()
    except (OSError, RuntimeError, ValueError):  # not a path on this system, for example because of a null byte
        target = base
    if not prefix or prefix.endswith("/") or not target.is_relative_to(base) or target == base:
        raise OutputError(
            f"'{prefix}' is not a file name inside {base}; use a name, optionally with folders before it."
        )
    check_name(target.relative_to(base).with_name(f"{target.name}.safetensors"))
    return target.parent, target.name


def place_file(path: Path, folder: Path, stem: str, suffix: str, *, numbered: bool = False) -> Path:
    """Hard-link ``path`` into ``folder`` as STEM + SUFFIX, or copy it where that fails; returns the new path.

    Where that name is taken, or with ``numbered``, the first free number is added: STEM_00001_SUFFIX. Existing files are never
    overwritten.

    Raises:
        OutputError: the folder cannot be written, or its disk has no room for a copy.
    """
    names = functools.partial(_unique_names, folder, stem, suffix, numbered)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        remove_leftovers(folder / _COPY)
        try:
            return _create_first(names(), lambda target: os.link(path, target))
        except OSError as error:
            log.info("copying %s into %s, because a hard link failed: %s", path, folder, error.strerror)
            check_disk_space(next(names()), path.stat().st_size)
            return _copy_file(path, folder, names())
    except OSError as error:
        raise OutputError(f"The model cannot be saved in {folder}: {error.strerror or error}.") from error


def _unique_names(folder: Path, stem: str, suffix: str, numbered: bool) -> Iterator[Path]:
    """The names to try: without a number unless ``numbered``, then with 1, 2, …"""
    if not numbered:
        yield folder / f"{stem}{suffix}"
    for number in itertools.count(1):
        yield folder / f"{stem}_{number:05}_{suffix}"


def _create_first(names: Iterator[Path], create: Callable[[Path], None]) -> Path:
    """The first of ``names`` that ``create`` accepts without a FileExistsError."""
    for target in names:
        with contextlib.suppress(FileExistsError):
            create(target)
            return target
    raise AssertionError("the names do not end")


def _copy_file(path: Path, folder: Path, names: Iterator[Path]) -> Path:
    """Copy ``path``; the copy has a hidden name until it is complete and on the disk."""
    partial = folder / f".{_COPY}.{os.urandom(4).hex()}.partial"
    try:
        with open(path, "rb") as source, open(partial, "xb") as target:
            lock_file(target)  # until it is closed or this process ends; the next one then deletes the file
            _copy_bytes(source, target)
            target.flush()
            flush_to_disk(target.fileno())
        return _create_first(names, lambda target: _rename_new(partial, target))
    finally:
        remove_file(partial)


def _copy_bytes(source, target) -> None:
    """Copy one open file to another; the user can interrupt it."""
    while chunk := source.read(_CHUNK):
        comfy.model_management.throw_exception_if_processing_interrupted()
        target.write(chunk)


def _rename_new(partial: Path, target: Path) -> None:
    """Rename a complete file. Raises FileExistsError where ``target`` exists."""
    try:
        os.link(partial, target)
    except FileExistsError:
        raise
    except OSError:  # no hard links on this disk; the check and the renaming are then two steps
        if target.exists():
            raise FileExistsError(target) from None
        partial.rename(target)
