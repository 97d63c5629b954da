"""Results that Save Quantized has saved in this process: a run of the same inputs uses the saved files.

The report of a result is only in memory, so files of earlier processes are not used.
"""

import contextlib
import os
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from ...quant_core import Report
from ...quant_core.output import provenance
from ...quant_core.run.fingerprint import has_fingerprint, may_be_newer
from ...quant_core.sources import SafetensorsFile
from .folders import file_stamp, place_file, remove_files, temporary_folder

__all__ = ["PartInputs", "SavedResult", "find_saved", "remember_saved"]

_RESULTS = 16  # remembered results; a report has up to 1 MB


class PartInputs(NamedTuple):
    """Inputs of the run of one part: the run's fingerprint, and the files that its source is read from."""

    fingerprint: str | None
    paths: tuple[Path, ...]


@dataclass(frozen=True)
class SavedResult:
    """Saved files of one result.

    Attributes:
        key: what all parts of the run have in common, see :func:`find_saved`.
        files: part name → saved file.
        stamps: part name → :func:`file_stamp` of the file after its verification.
        fingerprints: part name → fingerprint of the run.
        report: report of the run.
    """

    key: tuple
    files: Mapping[str, Path]
    stamps: Mapping[str, tuple[int, ...]]
    fingerprints: Mapping[str, str]
    report: Report

    def is_unchanged(self) -> bool:
        """Whether all files exist as they were saved."""
        with contextlib.suppress(OSError):
            return all(
                file_stamp(path) == self.stamps[part] and has_fingerprint(path, self.fingerprints[part])
                for part, path in self.files.items()
            )
        return False

    def is_made_from(self, inputs: Mapping[str, PartInputs]) -> bool:
        """Whether a run of these inputs writes the same files: equal fingerprints, and no source file is newer."""
        return {part: given.fingerprint for part, given in inputs.items()} == self.fingerprints and not any(
            may_be_newer(inputs[part].paths, path) for part, path in self.files.items()
        )

    def link_to_temp(self) -> dict[str, Path]:
        """Link the files into ComfyUI's temp folder, or copy them from another disk; returns {part: path}.

        Raises:
            OutputError: the folder cannot be written.
        """
        files = {}
        try:
            for part, path in self.files.items():
                stem = f"learned_rounding_{os.urandom(6).hex()}"
                files[part] = place_file(path, temporary_folder(), stem, path.suffix)
        except BaseException:
            remove_files(files.values())
            raise
        return files


_saved: deque[SavedResult] = deque(maxlen=_RESULTS)  # the latest first


def remember_saved(key: tuple, files: Mapping[str, Path], report: Report) -> None:
    """Remember verified files for :func:`find_saved`; results of inputs without a fingerprint are not remembered."""
    fingerprints = {}
    for part, path in files.items():
        with SafetensorsFile(path) as file:
            fingerprints[part] = provenance(file).get("fingerprint")
    if None not in fingerprints.values():
        stamps = {part: file_stamp(path) for part, path in files.items()}
        _saved.appendleft(SavedResult(key, dict(files), stamps, fingerprints, report))


def find_saved(key: tuple, inputs: Callable[[], Mapping[str, PartInputs]]) -> SavedResult | None:
    """The latest unchanged result of a run of the same inputs; None if there is none.

    Args:
        key: kind of the model, recipe and calibration.
        inputs: reads the inputs of each part; called only if a result with that key was saved.
    """
    candidates = [result for result in _saved if result.key == key and result.is_unchanged()]
    if not candidates:
        return None
    given = inputs()
    return next((result for result in candidates if result.is_made_from(given)), None)
