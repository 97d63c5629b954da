"""When a run is already done, when its inputs have changed, and which killed run it may resume."""

import contextlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch

from ... import kernels
from ..calibration import Calibration
from ..errors import OutputExistsError, QuantizationError, SourceError
from ..output import provenance
from ..recipes import Recipe
from ..sources import SafetensorsFile, Source
from ..sources.source import fingerprint
from ..version import VERSION

__all__ = ["FileStates", "has_fingerprint", "input_paths", "is_done", "may_be_newer", "run_fingerprint", "run_key"]


def run_fingerprint(
    source: Source, recipe: Recipe, calibration: Calibration | None, walk: str | None = None
) -> str | None:
    """Fingerprint of the inputs of a run, from samples of the source; None if they have none, as some sources in memory.

    ``walk``: that of the running model, see :func:`~.blocks.walk_fingerprint`.
    """
    others = [VERSION, recipe.to_json()]
    if calibration is not None:
        if not calibration.fingerprint:
            return None
        others.append(calibration.fingerprint)
    return fingerprint(source, *others, *([] if walk is None else [walk]))


def has_fingerprint(path: Path, expected: str | None) -> bool:
    """Whether the file at ``path`` is the output of a run with this fingerprint."""
    if expected is None:
        return False
    try:
        with SafetensorsFile(path) as output:
            return provenance(output).get("fingerprint") == expected
    except QuantizationError:
        return False


def input_paths(data: Source | Calibration | None) -> tuple[Path, ...]:
    """Files that a source or a calibration is read from; empty if it is in memory."""
    return getattr(data, "paths", ())


def may_be_newer(inputs: Iterable[Path], output: Path) -> bool:
    """Whether an input may have changed since the output was made.

    The change time counts too: it shows a file that was moved there with an older modification time.
    """
    made = output.stat().st_mtime_ns
    return any(max(status.st_mtime_ns, status.st_ctime_ns) > made for status in (path.stat() for path in inputs))


def is_done(
    output: Path, expected: str | None, *, source: Sequence[Path], calibration: Sequence[Path], overwrite: bool
) -> bool:
    """Whether an output exists and needs no run.

    Args:
        expected: fingerprint of the run.
        source, calibration: their files, see :func:`input_paths`.
        overwrite: whether another file may be replaced.

    Raises:
        OutputExistsError: the file was made from something else, and must not be replaced.
    """
    if not output.exists():
        return False
    if has_fingerprint(output, expected):
        # The fingerprint has samples only. Weights in memory have no time of change, so they are always compared.
        return bool(source) and not may_be_newer((*source, *calibration), output)
    if not overwrite:
        raise OutputExistsError(
            f"{output} exists and was made from something else; choose another output or overwrite it."
        )
    return False


class FileStates:
    """Inode, size, modification time and change time of input files, at the start of a run."""

    def __init__(self, paths: Iterable[Path]):
        self._states = _read_states(paths)

    def check_unwritten(self, source: Source) -> bool:
        """Raise :class:`SourceError` if a file was written to since; a replaced file is still read as it was.

        Returns False if the change time of a file is another one, while its size and its modification time are the same. It
        was renamed, or it has other permissions, or it was written to and its modification time was set back.
        """
        same = True
        for path, state in _read_states(self._states).items():
            before = self._states[path]
            if state[0] == before[0] and state[:-1] != before[:-1]:
                raise SourceError(f"{source.name}: {path} was changed while it was read; run again.")
            same = same and state == before
        return same

    def to_json(self) -> list[tuple[int, ...]]:
        """The states as plain values."""
        return list(self._states.values())


def _read_states(paths: Iterable[Path]) -> dict[Path, tuple[int, ...]]:
    states = {}
    for path in paths:
        with contextlib.suppress(OSError):
            status = path.stat()
            states[path] = status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
    return states


def run_key(
    expected: str | None,
    configs: Mapping[str, Mapping[str, object]],
    calibration: FileStates,
    device: torch.device | str,
) -> str | None:
    """Key of the runs that write the same bytes, for :class:`~.resume.RunJournal`; None for a run without a fingerprint.

    ``configs``: layer → planned JSON configuration. The journal compares the tensors of the source by their checksums. The
    GPU, torch and the kernels are part of the key, since they may round ties differently; ``device``: of the arithmetic, or
    the name of its model where it is that of another machine.
    """
    if expected is None:
        return None
    if isinstance(device, torch.device):
        device = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return json.dumps([expected, configs, calibration.to_json(), [device, torch.__version__, kernels.backend()]])
