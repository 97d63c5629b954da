"""fsync that also flushes the drive cache on macOS, and in the background."""

import contextlib
import errno
import os
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from typing import IO, Any

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

__all__ = ["flush_in_background", "flush_to_disk"]

_FULL_FSYNC = getattr(fcntl, "F_FULLFSYNC", None)  # macOS, where os.fsync leaves data in the drive cache
_UNSUPPORTED = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOTTY, errno.ENODEV)  # network disks of macOS


def flush_to_disk(descriptor: int) -> None:
    """Wait until an open file or folder is on the disk. Raises OSError if the disk fails."""
    if fcntl is not None and _FULL_FSYNC is not None:
        try:
            fcntl.fcntl(descriptor, _FULL_FSYNC)
            return
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise
    os.fsync(descriptor)


def flush_in_background(submit: Callable[..., "Future[Any]"], files: Iterable[IO[bytes]]) -> "Future[None]":
    """Flush open files, which may be closed meanwhile, on the thread that ``submit`` chooses."""
    with contextlib.ExitStack() as opened:
        copies: list[int] = []
        for file in files:
            copies.append(os.dup(file.fileno()))
            opened.callback(os.close, copies[-1])
        flush = submit(_flush_and_close, copies)
        opened.pop_all()
    return flush


def _flush_and_close(descriptors: Iterable[int]) -> None:
    with contextlib.ExitStack() as opened:
        for descriptor in descriptors:
            opened.callback(os.close, descriptor)
        for descriptor in descriptors:
            flush_to_disk(descriptor)
