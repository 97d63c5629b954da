"""Marks of tests that need what this system, its file system or its user may lack; see also the mark ``posix``."""

import os
import shutil
import tempfile
from pathlib import Path

import pytest

__all__ = ["FULL_DEVICE", "needs_full_device", "needs_long_names", "needs_shell", "needs_symlinks"]

FULL_DEVICE = Path("/dev/full")


def _can_link() -> bool:
    """Whether this user may create symbolic links: on Windows that is a privilege, and some file systems have none."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            os.symlink("target", Path(folder, "link"))
        except OSError:
            return False
    return True


def _can_name() -> bool:
    """Whether a file may have a name of 255 characters: Windows limits whole paths to 260 of them, unless it is configured otherwise."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            Path(folder, "a" * 255).touch()
        except OSError:
            return False
    return True


needs_long_names = pytest.mark.skipif(not _can_name(), reason="no names of 255 characters")
needs_symlinks = pytest.mark.skipif(not _can_link(), reason="this user cannot create symbolic links")
needs_full_device = pytest.mark.skipif(not FULL_DEVICE.exists(), reason="only Linux has /dev/full")
needs_shell = pytest.mark.skipif(os.name == "nt" or shutil.which("sh") is None, reason="no POSIX shell")
