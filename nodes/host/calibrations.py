"""Calibrations passed between nodes, and calibration files in ComfyUI's folders."""

import contextlib
import glob
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import comfy.model_management
import folder_paths

from ...quant_core.calibration import CALLS_SUFFIX, SUFFIX, CalibrationFile, ReplaySet
from ...quant_core.display import human_bytes
from ...quant_core.errors import CalibrationError, SourceError
from .folders import file_stamp, place_file, remove_files, resolve_prefix
from .recording import describe_calls

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
    """Return a value that changes when the file or its recorded calls change."""
    path = _calibration_path(name)
    return tuple(value for file in (path, *_find_calls(path).values()) for value in file_stamp(file))


def _calls_path(path: Path, part: str) -> Path:
    """File of the recorded calls of a part, beside the calibration file ``path``."""
    stem = path.name.removesuffix(SUFFIX)
    return path.with_name(f"{stem}.{part}{CALLS_SUFFIX}" if part else f"{stem}{CALLS_SUFFIX}")


def _find_calls(path: Path) -> dict[str, Path]:
    """Part → file of recorded calls beside a calibration file."""
    start = _calls_path(path, "").name.removesuffix(CALLS_SUFFIX)
    found = sorted(path.parent.glob(f"{glob.escape(start)}*{CALLS_SUFFIX}"))
    parts = {file.name.removeprefix(start).removesuffix(CALLS_SUFFIX).removeprefix("."): file for file in found}
    return {part: file for part, file in parts.items() if file == _calls_path(path, part)}


def _load_calls(path: Path, fingerprint: str | None) -> dict[str, ReplaySet]:
    """Load the calls that were saved with the calibration file ``path``; those of another calibration are ignored."""
    found = {part: ReplaySet.load(file) for part, file in _find_calls(path).items()}
    return {part: replays for part, replays in found.items() if replays.calibration == fingerprint}


def load_calibration(name: str) -> tuple[Calibrated, str]:
    """Load a saved calibration; returns it and a description.

    Raises:
        SourceError: the file is missing or is not a valid safetensors file, or the file of its recorded calls is not.
        CalibrationError: the file is not a valid calibration, or its recorded calls are not valid.
    """
    path = _calibration_path(name)
    with CalibrationFile(path) as file:
        lines = [f"{path.name}: {human_bytes(path.stat().st_size)}, {len(file.layers)} linear layers"]
        lines += [f"{key}: {value}" for key, value in file.provenance.items() if not isinstance(value, list)]
        if replays := _load_calls(path, file.fingerprint):
            lines.append(describe_calls(replays))
        return Calibrated(path, file.fingerprint, temporary=False, replays=replays), "\n".join(lines)


def save_calibration(calibration: Calibrated, prefix: str, *, save_calls: bool = False) -> Path:
    """Save a calibration in the output folder under a new name that starts with ``prefix``; returns the path.

    Existing files are not overwritten, and ``prefix`` cannot refer to a folder outside the output folder.
    ``save_calls``: also save its recorded calls, beside the file.

    Raises:
        CalibrationError: there are no recorded calls to save.
        OutputError: the folder cannot be written.
    """
    if save_calls and not calibration.replays:
        raise CalibrationError(
            "The calibration has no recorded calls of the model to save; calibrate again with replay_calls, or turn "
            "save_calls off."
        )
    folder, stem = resolve_prefix(_calibration_folders()[0], prefix)
    path = place_file(calibration.path, folder, stem, SUFFIX, numbered=True)
    files = {part: _calls_path(path, part) for part in (calibration.replays if save_calls else ())}
    saved = [path]
    try:
        for part, file in files.items():
            check = comfy.model_management.throw_exception_if_processing_interrupted
            calibration.replays[part].save(file, calibration.fingerprint or "", check)
            saved.append(file)
    except BaseException:
        remove_files(saved)
        raise
    return path
