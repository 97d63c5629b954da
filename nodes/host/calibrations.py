"""Calibrations passed between nodes, and calibration files in ComfyUI's folders."""

import contextlib
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import folder_paths

from ...quant_core.calibration import SUFFIX, CalibrationFile, ReplaySet
from ...quant_core.display import human_bytes
from ...quant_core.errors import SourceError
from .folders import file_stamp, place_file, remove_files, resolve_prefix

__all__ = ["Calibrated", "calibration_files", "calibration_state", "load_calibration", "save_calibration"]


@dataclass(frozen=True)
class Calibrated:
    """A calibration file as the value of a node's output.

    Attributes:
        path: of the file.
        fingerprint: changes when the statistics change.
        temporary: remove the file when this object is deleted.
        replays: part → recorded calls, "" for a diffusion model; empty if none were recorded.
    """

    path: Path
    fingerprint: str | None
    temporary: bool = True
    replays: Mapping[str, ReplaySet] = field(default_factory=dict)

    def __post_init__(self):
        if self.temporary:
            weakref.finalize(self, remove_files, (self.path,))

    def open(self) -> CalibrationFile:
        """Open the file for reading; a context manager."""
        return CalibrationFile(self.path)


_FOLDER = "calibrations"


def _calibration_folders() -> list[Path]:
    """Folders with calibration files; new ones are saved in the first."""
    return [Path(folder_paths.get_output_directory()) / _FOLDER, Path(folder_paths.models_dir) / _FOLDER]


def calibration_files() -> list[str]:
    """Return the sorted names of all calibration files, relative to their folders."""
    names = {
        path.relative_to(folder).as_posix() for folder in _calibration_folders() for path in folder.rglob(f"*{SUFFIX}")
    }
    return sorted(names)


def _calibration_path(name: str) -> Path:
    for folder in _calibration_folders():
        # A name that the file system does not accept, such as one with a null byte, is reported as not found.
        with contextlib.suppress(OSError, RuntimeError, ValueError):
            path = (folder / name).resolve()
            if path.is_relative_to(folder.resolve()) and path.is_file():
                return path
    raise SourceError(f"Calibration {name} not found; refresh the list and choose another file.")


def calibration_state(name: str) -> tuple[int, ...]:
    """Return a value that changes when the file changes."""
    return file_stamp(_calibration_path(name))


def load_calibration(name: str) -> tuple[Calibrated, str]:
    """Load a saved calibration; returns it and a description.

    Raises:
        SourceError: the file is missing or is not a valid safetensors file.
        CalibrationError: the file is not a valid calibration.
    """
    path = _calibration_path(name)
    with CalibrationFile(path) as file:
        lines = [f"{path.name}: {human_bytes(path.stat().st_size)}, {len(file.layers)} linear layers"]
        lines += [f"{key}: {value}" for key, value in file.provenance.items() if not isinstance(value, list)]
        return Calibrated(path, file.fingerprint, temporary=False), "\n".join(lines)


def save_calibration(calibration: Calibrated, prefix: str) -> Path:
    """Save a calibration in the output folder under a new name that starts with ``prefix``; returns the path.

    Existing files are not overwritten, and ``prefix`` cannot refer to a folder outside the output folder.
    """
    folder, stem = resolve_prefix(_calibration_folders()[0], prefix)
    return place_file(calibration.path, folder, stem, SUFFIX)
