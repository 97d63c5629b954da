"""fsync that also flushes the drive cache on macOS."""

import errno
import os

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

__all__ = ["flush_to_disk"]

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
