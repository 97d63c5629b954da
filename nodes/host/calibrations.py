"""Calibrations between nodes, and their files in ComfyUI's folders."""

import contextlib
import weakref
from dataclasses import dataclass
from pathlib import Path

import folder_paths

from ...quant_core.calibration import SUFFIX, CalibrationFile
from ...quant_core.display import human_bytes
from ...quant_core.errors import SourceError
from .folders import destination, place, remove, stamp

__all__ = ["Calibrated", "calibration_files", "calibration_state", "load_calibration", "save_calibration"]


@dataclass(frozen=True)
class Calibrated:
    """A calibration file; a temporary one is removed when nothing uses it any more. ``mark`` changes when it does."""

    path: Path
    mark: str
    temporary: bool = True

    def __post_init__(self):
        if self.temporary:
            weakref.finalize(self, remove, (self.path,))

    def open(self) -> CalibrationFile:
        """For reading, as a context."""
        return CalibrationFile(self.path)


# Where calibrations are looked for; the first is where they are saved.
_CALIBRATIONS = "calibrations"


def _calibration_folders() -> list[Path]:
    return [
        Path(folder_paths.get_output_directory()) / _CALIBRATIONS,
        Path(folder_paths.models_dir) / _CALIBRATIONS,
    ]


def calibration_files() -> list[str]:
    """Names of the calibrations a user can choose."""
    found = {
        path.relative_to(folder).as_posix() for folder in _calibration_folders() for path in folder.rglob(f"*{SUFFIX}")
    }
    return sorted(found)


def _calibration_path(name: str) -> Path:
    for folder in _calibration_folders():
        with contextlib.suppress(
            OSError, RuntimeError, ValueError
        ):  # what no system takes for a name, as one with a zero byte
            path = (folder / name).resolve()
            if path.is_relative_to(folder.resolve()) and path.is_file():
                return path
    raise SourceError(f"There is no calibration '{name}'; refresh the list and choose again.")


def calibration_state(name: str) -> tuple[int, int]:
    """Changes when the chosen calibration does."""
    return stamp(_calibration_path(name))


def load_calibration(name: str) -> tuple[Calibrated, str]:
    """A saved calibration, and what it says of itself."""
    path = _calibration_path(name)
    with CalibrationFile(path) as made:
        lines = [f"{path.name}: {human_bytes(path.stat().st_size)}, {len(made.layers)} linear layers"]
        lines += [f"{key}: {value}" for key, value in made.provenance.items() if not isinstance(value, list)]
        return Calibrated(path, made.mark, temporary=False), "\n".join(lines)


def save_calibration(calibration: Calibrated, prefix: str) -> Path:
    """Give a calibration a lasting name in the output folder; never overwrites, never leaves the folder."""
    folder, stem = destination(_calibration_folders()[0], prefix)
    return place(calibration.path, folder, stem, SUFFIX)
