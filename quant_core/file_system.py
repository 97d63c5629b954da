"""Where Windows differs from other systems: open files, names of files, and long paths.

A function that Windows lacks is looked up in ``os`` where it is used, with another way beside it. ``tests/windows.py`` lists
these functions and takes them away.
"""

import contextlib
import os
import re
import stat
import time
from collections.abc import Callable
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

__all__ = [
    "FOLDER",
    "WINDOWS",
    "find_invalid_part",
    "find_special_kind",
    "is_same_path",
    "long_path",
    "remove_file",
    "rename_file",
    "replace_file",
    "widen_pipe",
]

WINDOWS = not hasattr(os, "geteuid")  # by what it lacks, so that tests can take it away
_WAITS = (
    0.01,
    0.02,
    0.05,
    0.1,
    0.2,
    0.5,
    1,
)  # s between attempts: a virus scanner or an indexer opens new files for a moment
_LONGEST = 247  # characters of a path of a folder; that of a file may have 259
_PIPE_BYTES = 1 << 20
_HIDDEN = 18  # characters that the name of a hidden file has more than that of its output
_PREFIX, _SHARE = "\\\\?\\", "\\\\?\\UNC\\"  # of paths of up to 32,767 characters
_DEVICES = frozenset(
    (
        "CON",
        "PRN",
        "AUX",
        "NUL",
        "CONIN$",
        "CONOUT$",
        *(kind + number for kind in ("COM", "LPT") for number in "123456789¹²³"),
    )
)
FOLDER = "a folder"
_KINDS: tuple[tuple[Callable[[int], bool], str], ...] = (
    (stat.S_ISDIR, FOLDER),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (lambda mode: True, "a device"),
)
_CHARACTERS = re.compile(r'[<>:"|?*\x01-\x1f]')


def find_special_kind(path: Path) -> str | None:
    """What is at ``path``, without opening it; None for a regular file, or if that cannot be found out."""
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError):  # ValueError: null character in the path
        return None
    return None if stat.S_ISREG(mode) else next(kind for test, kind in _KINDS if test(mode))


def find_invalid_part(path: Path) -> str | None:
    """The first part of a path that no file or folder on Windows can have as its name; None on other systems.

    Windows opens a device instead of ``nul.txt``, a hidden stream of the file ``a`` instead of ``a:b``, and the file ``a``
    instead of ``a.``.
    """
    if not WINDOWS:
        return None
    parts = path.parts[1:] if path.anchor else path.parts
    return next((part for part in parts if part != ".." and _is_invalid(part)), None)


def _is_invalid(name: str) -> bool:
    stem = name.partition(".")[0].rstrip(" ").upper()
    return stem in _DEVICES or name.endswith((".", " ")) or bool(_CHARACTERS.search(name))


def long_path(path: Path) -> Path:
    """``path`` with the prefix that lifts the limit of Windows, if it or its hidden file is too long without one."""
    absolute = os.path.abspath(path)
    drive = os.path.splitdrive(absolute)[0]  # none on other systems
    if not drive or absolute.startswith(_PREFIX) or len(absolute) + _HIDDEN <= _LONGEST:
        return path
    return Path(_SHARE + absolute[2:] if drive.startswith("\\\\") else _PREFIX + absolute)


def is_same_path(path: Path, other: Path) -> bool:
    """Whether two paths name the same file, which need not exist. Names that differ in their case do on Windows."""
    first, second = (os.path.normcase(os.path.realpath(each)).removeprefix(_PREFIX) for each in (path, other))
    return first == second or (os.path.exists(path) and os.path.exists(other) and os.path.samefile(path, other))


def remove_file(path: Path) -> bool:
    """Remove a file if it exists; False if it is still there. Windows removes no file that is open or mapped."""
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)
        return True
    return False


def replace_file(path: Path, target: Path) -> None:
    """Rename a file, replacing another one. Raises OSError."""
    _repeat(os.replace, path, target)


def rename_file(path: Path, target: Path) -> None:
    """Rename a file. Raises FileExistsError on Windows where ``target`` exists; elsewhere it is replaced."""
    _repeat(os.rename, path, target)


def _repeat(rename: Callable[[Path, Path], None], path: Path, target: Path) -> None:
    """Rename; on Windows again if a file is open, as it is for a moment after it was written."""
    for wait in _WAITS if WINDOWS else ():
        try:
            return rename(path, target)
        except PermissionError:
            time.sleep(wait)
    return rename(path, target)


def widen_pipe(descriptor: int) -> None:
    """Let a pipe hold a megabyte, where the system has such pipes and its limits for this user allow it."""
    if fcntl is not None and hasattr(fcntl, "F_SETPIPE_SZ"):
        with contextlib.suppress(OSError):
            fcntl.fcntl(descriptor, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)  # type: ignore[attr-defined]
