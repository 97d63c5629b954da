"""The sources of a plan: paths, patterns, and tables with either."""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from glob import glob, has_magic
from pathlib import Path
from typing import Any

from ..calibration.file import SUFFIX as CALIBRATION_SUFFIX
from ..errors import QuantizationError, SourceError
from ..file_system import FOLDER, find_special_kind
from ..sources.opening import model_paths
from ..sources.shards import model_stem
from .problems import Problems, show

__all__ = ["SOURCE_KEYS", "PlannedSource", "count_bytes", "expand_all", "list_files", "path_key", "read_sources"]

# Keys of a source → type of the value.
SOURCE_KEYS: Mapping[str, type] = {"path": str, "name": str, "calibration": str, "output": str}
_SUFFIXES = (".safetensors", ".sft", ".gguf", ".ckpt", ".pt", ".pth", ".bin")  # of what a pattern finds


@dataclass(frozen=True)
class PlannedSource:
    """One model.

    Attributes:
        path: of the model.
        name: placeholder {source} of outputs; by default the name of the file without its suffix.
        output, calibration: that hold for this source instead of those of the plan; None where it has none.
        found: a pattern found it.
    """

    path: Path
    name: str
    output: str | None = None
    calibration: str | None = None
    found: bool = False


def read_sources(problems: Problems, entries: Sequence[Any]) -> list[PlannedSource]:
    """The models of the list ``sources`` of a plan; one that it names by its path is not found by a pattern again.

    A pattern finds a model of several files once.
    """
    listed = [source for index, entry in enumerate(entries, 1) for source in _read_entry(problems, index, entry)]
    named = {path_key(source.path) for source in listed if not source.found}
    taken: set[str] = set()
    kept = []
    for source in listed:
        key = path_key(source.path)
        if not source.found:
            kept.append(source)
        elif key not in named and key not in taken:
            taken.update(map(path_key, (source.path, *list_files(source.path))))
            kept.append(source)
    return kept


def expand_all(problems: Problems, where: str, patterns: Sequence[Any]) -> frozenset[str]:
    """The :func:`path_key` of every model that a list of paths and patterns names; ``where``: the list in messages."""
    keys: set[str] = set()
    for pattern in patterns:
        if isinstance(pattern, str):
            keys.update(map(path_key, _expand(problems, where, pattern)[0]))
        else:
            problems.add(SourceError, f"{where} has {show(pattern)}; give paths and patterns in quotes.", "sources")
    return frozenset(keys)


def list_files(path: Path) -> Iterable[Path]:
    """The files of a model: its shards, those of a folder, or the file itself."""
    try:
        if path.is_dir():
            return [file for file in path.iterdir() if file.is_file()]
        return model_paths(path)
    except (OSError, ValueError, QuantizationError):  # a damaged index is reported when the source is opened
        return (path,)


def count_bytes(path: Path) -> int:
    """Size of the files of a model in bytes."""
    return sum(file.stat().st_size for file in list_files(path) if os.path.isfile(file))


def path_key(path: Path) -> str:
    """Equal for two names of one path, whether it exists or not."""
    try:
        return os.path.normcase(os.path.realpath(path))
    except ValueError:  # null character, which is reported when the file is checked
        return str(path)


def _read_entry(problems: Problems, index: int, entry: object) -> Iterator[PlannedSource]:
    where = f"source {index}"
    if isinstance(entry, str):
        entry = {"path": entry}
    if not isinstance(entry, dict):
        problems.add(SourceError, f"{where} must be a path in quotes or a table, not {show(entry)}.", "sources")
        return
    values = problems.check_table(where, entry, SOURCE_KEYS)
    if not values.get("path"):
        if not entry.get("path"):
            problems.add(SourceError, f"{where} has no path; give a model or a pattern.", "sources")
        return
    paths, found = _expand(problems, where, values["path"])
    name = values.get("name")
    if name is not None:
        problems.check_name(where, name)
        if len(paths) > 1:
            problems.add(SourceError, f"{where} has one name for {len(paths)} models; leave the name out.", "sources")
    for path in paths:
        stem = path.absolute().name if path.is_dir() else model_stem(path.name)
        yield PlannedSource(path, name or stem, values.get("output"), values.get("calibration"), found)


def _expand(problems: Problems, where: str, pattern: str) -> tuple[list[Path], bool]:
    """The models that a path or a pattern names, sorted, and whether it is a pattern."""
    folder = problems.path.parent
    path = folder / pattern
    try:
        if os.path.exists(path) or not has_magic(pattern):
            if not os.path.exists(path):
                problems.add(SourceError, f"{where}, {path}, does not exist; correct the path.", "sources")
            elif (kind := find_special_kind(path)) not in (None, FOLDER):
                problems.add(SourceError, f"{where}, {path}, is {kind}; give a regular file.", "sources")
            return [path], False
        names = sorted(glob(pattern, root_dir=folder, recursive=True))
    except (OSError, ValueError, NotImplementedError) as error:  # ValueError: null character
        problems.add(SourceError, f"{where}, {show(repr(pattern))}, cannot be searched: {error}.", "sources")
        return [], False
    files = [folder / name for name in names if not name.endswith(CALIBRATION_SUFFIX)]
    models = [file for file in files if find_special_kind(file) is None and file.suffix.lower() in _SUFFIXES]
    if not models:
        problems.add(SourceError, f"{where}, {show(pattern)}, matches no model; correct the pattern.", "sources")
    return models, True
