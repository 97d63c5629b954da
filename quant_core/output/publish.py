"""Rules for the final name of an output: which names are allowed, when a file is replaced, how the name is made durable."""

import errno
import filecmp
import os
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path

from ..errors import OutputError, OutputExistsError
from ..file_system import WINDOWS, find_invalid_part, is_same_path, long_path, rename_file, replace_file
from .durable import flush_to_disk

__all__ = ["check_name", "final_path", "flush_folder", "keep_apart", "output_error", "publish_file"]

_FULL = (errno.ENOSPC, errno.EDQUOT)
_READ_ONLY = (errno.EACCES, errno.EPERM, errno.EROFS)
_NO_HARD_LINKS = (
    errno.EPERM,
    errno.EACCES,
    errno.EMLINK,
    errno.ENOSYS,
    errno.ENOTSUP,
    errno.EOPNOTSUPP,
    errno.EINVAL,
)
_NO_FOLDER_FSYNC = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EACCES, errno.EBADF)


def output_error(error: OSError, path: Path) -> OutputError:
    """The :class:`OutputError` that explains why ``path`` cannot be written."""
    if error.errno in _FULL:
        return OutputError(
            f"The disk is full: {path} could not be written and nothing of it is left; free some space and run again."
        )
    if WINDOWS and error.errno in _READ_ONLY and path.is_file():
        return OutputError(
            f"{path} cannot be replaced: another program has it open, or it is read-only; close that program, and run again."
        )
    if error.errno in _READ_ONLY:
        return OutputError(f"The folder {path.parent} is read-only for this user; choose another output.")
    return OutputError(f"{path} cannot be written: {error.strerror or error}; check the disk and the folder.")


def check_name(path: Path) -> None:
    """Raise :class:`OutputError` if a file or folder of ``path`` has a name that Windows cannot store.

    Other systems have files of such names, so that they are refused on Windows only.
    """
    part = find_invalid_part(path)
    if part is not None:
        raise OutputError(
            f"'{part}' in {path} is not a valid name of a file or folder on Windows; choose another name."
        )


def final_path(path: str | os.PathLike) -> Path:
    """The file that an output named ``path`` writes: a symbolic link is followed.

    Raises:
        OutputError: the path is a folder, a device or a pipe, or not a valid file name.
    """
    path = Path(os.path.realpath(path) if os.path.islink(path) else path)
    check_name(path)
    path = long_path(path)
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return path
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        raise output_error(error if isinstance(error, OSError) else OSError(str(error)), path) from error
    if stat.S_ISDIR(mode):
        raise OutputError(f"{path} is a folder; give a file name.")
    if not stat.S_ISREG(mode):
        raise OutputError(f"{path} is not a regular file but a device or a pipe; give a file name.")
    return path


def keep_apart(path: Path, others: Mapping[str, Iterable[Path | None]], what: str = "output") -> None:
    """Raise :class:`OutputError` if ``path``, the ``what`` of a run, is one of its other files under any name.

    ``others``: role → paths of the other files of the run; None for a file that the run does not use.
    """
    for role, files in others.items():
        for file in filter(None, files):
            if is_same_path(path, file):
                raise OutputError(f"{path} is the {role} itself; choose another {what}.")


def publish_file(hidden: Path, path: Path, *, overwrite: bool) -> bool:
    """Give the complete file ``hidden`` the name ``path``; False if a file with the same content already has it.

    ``hidden`` may remain as a second name of the file; the caller removes it.

    Raises:
        OutputExistsError: a file with other content has the name, and ``overwrite`` is False.
        OSError: the disk failed.
    """
    if overwrite:
        replace_file(hidden, path)
        return True
    try:
        _link_unless_exists(hidden, path)
    except FileExistsError as error:
        if not filecmp.cmp(hidden, path, shallow=False):
            raise OutputExistsError(
                f"{path} exists and was made from something else; choose another output or overwrite it."
            ) from error
        return False
    return True


def _link_unless_exists(hidden: Path, path: Path) -> None:
    """Name ``hidden`` also ``path``, or rename it where hard links are not supported. Raises FileExistsError."""
    if WINDOWS:
        rename_file(hidden, path)
        return
    try:
        os.link(hidden, path)
    except OSError as error:
        if error.errno not in _NO_HARD_LINKS:
            raise
        if os.path.lexists(path):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST)) from error
        # Without hard links, a file created between the check and this line is replaced.
        replace_file(hidden, path)


def flush_folder(folder: Path) -> None:
    """Make the names in a folder durable, where the system opens folders and the file system supports it."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            flush_to_disk(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in _NO_FOLDER_FSYNC:
            raise
