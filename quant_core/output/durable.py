"""What survives a power cut."""

import errno
import os

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

__all__ = ["to_disk"]

_FULL = getattr(fcntl, "F_FULLFSYNC", None)  # macOS: os.fsync leaves it in the cache of the disk
_NOT_THERE = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOTTY, errno.ENODEV)  # on some of its network disks


def to_disk(descriptor: int) -> None:
    """Wait until the disk has an open file, or folder. Raises OSError when it has not."""
    if _FULL is not None:
        try:
            fcntl.fcntl(descriptor, _FULL)
            return
        except OSError as error:
            if error.errno not in _NOT_THERE:
                raise
    os.fsync(descriptor)
