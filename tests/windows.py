"""``pytest --windows``: takes from this process what Windows lacks, before the package is imported.

Two tables: names that Windows does not have are removed, and functions that behave otherwise there are replaced. ``os.name``
stays, because torch and the standard library choose their code by it; so do child processes. On Windows the option changes
nothing. Either way, tests marked ``posix`` are skipped.

The fixture ``windows`` (conftest.py) masks the functions during one test, and sets what modules looked up at their import.
"""

import errno
import importlib
import os
import shutil
import stat
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

__all__ = ["AT_IMPORT", "BEHAVIOURS", "FLAGS", "FUNCTIONS", "MODULES", "mask"]

WINDOWS = os.name == "nt"
PACKAGE = "learned_rounding."
PATHS = ("pathlib", "shutil", "tempfile", "contextlib", "os", __name__)  # modules between a caller and ``os``

MODULES = ("fcntl", "grp", "pty", "pwd", "resource", "termios", "tty")
FUNCTIONS = tuple(
    "chown chroot confstr copy_file_range ctermid eventfd fchdir fchown fork forkpty getegid geteuid getgid getgroups getloadavg "
    "getpgid getpgrp getpriority getresgid getresuid getsid getuid initgroups killpg lchown lockf major makedev memfd_create "
    "minor mkfifo mknod nice openpty pathconf posix_fadvise posix_fallocate posix_spawn posix_spawnp pread preadv pwrite pwritev "
    "readv sched_getaffinity sched_setaffinity sched_yield sendfile setegid seteuid setgid setgroups setpgid setpriority setregid "
    "setresgid setresuid setreuid setsid setuid splice statvfs fstatvfs sync sysconf tcgetpgrp tcsetpgrp ttyname uname wait wait3 "
    "wait4 waitid writev".split()
)
FLAGS = tuple(
    "O_ASYNC O_CLOEXEC O_DIRECT O_DIRECTORY O_DSYNC O_EXLOCK O_FSYNC O_LARGEFILE O_NDELAY O_NOATIME O_NOCTTY O_NOFOLLOW O_NONBLOCK "
    "O_PATH O_RSYNC O_SHLOCK O_SYNC".split()
)

# Module → what it looks up when it is imported, and what it finds on Windows.
AT_IMPORT: dict[str, dict[str, object]] = {
    "quant_core.file_system": {"WINDOWS": True, "fcntl": None},
    "quant_core.output.durable": {"fcntl": None, "_FULL_FSYNC": None},
    "quant_core.output.partial": {"WINDOWS": True, "_NO_FOLLOW": 0, "_PATIENCE": 2},
    "quant_core.output.publish": {"WINDOWS": True},
    "quant_core.sources.positional": {"_PARALLEL": False},
}

BEHAVIOURS: dict[str, Callable] = {}  # name in ``os`` → makes the function of Windows from that of this system


def behaviour(*names: str) -> Callable[[Callable], Callable]:
    def add(make: Callable) -> Callable:
        BEHAVIOURS.update(dict.fromkeys(names, make))
        return make

    return add


@behaviour("open")
def _refuse_folders(real):
    """Windows opens no folder as a file."""

    def refuse_folder(path, flags, *arguments, **options):
        temporary = flags & getattr(os, "O_TMPFILE", 0)  # a file without a name, in the way of this system
        if temporary != getattr(os, "O_TMPFILE", -1) and os.path.isdir(path):
            raise _denied(path)
        return real(path, flags, *arguments, **options)

    return refuse_folder


@behaviour("fsync")
def _refuse_read_only(real):
    """Windows flushes no file that was opened for reading only."""

    def flush(file):
        descriptor = file if isinstance(file, int) else file.fileno()
        flags = Path(f"/proc/self/fdinfo/{descriptor}").read_text(encoding="ascii").split("flags:")[1].split()[0]
        if int(flags, 8) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        real(descriptor)

    return flush


@behaviour("unlink", "remove")
def _keep_open_files(real):
    """Windows removes no file that is open or mapped."""

    def remove(path, *, dir_fd=None):
        if dir_fd is None and _is_open(path):
            raise _denied(path)
        real(path, dir_fd=dir_fd)

    return remove


@behaviour("replace")
def _replace_closed_files(real):
    """Windows neither renames nor replaces a file that is open or mapped."""

    def replace(path, target, **options):
        if _is_open(path) or _is_open(target):
            raise _denied(target)
        real(path, target, **options)

    return replace


@behaviour("rename")
def _rename_to_free_names(real):
    """Windows does not replace a file by a rename."""

    def rename(path, target, **options):
        if _is_open(path):
            raise _denied(path)
        if os.path.lexists(target):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path), None, str(target))
        real(path, target, **options)

    return rename


@behaviour("link", "symlink")
def _refuse_links(real):
    """The package gets no hard link, as on FAT, and no symbolic link, as without the privilege; tests prepare files with them."""

    def link(*arguments, **options):
        if _is_called_by_package():
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real(*arguments, **options)

    return link


@behaviour("chmod")
def _set_read_only(real):
    """Windows has one bit of a mode, that of read-only files."""

    def set_mode(path, mode, **options):
        if not os.path.isdir(path):
            real(path, 0o666 if mode & stat.S_IWRITE else 0o444, **options)

    return set_mode


def _denied(path) -> PermissionError:
    return PermissionError(errno.EACCES, os.strerror(errno.EACCES), os.fspath(path))


def _is_open(path) -> bool:
    """Whether this process has a file open or mapped."""
    try:
        wanted = os.lstat(path)
    except OSError:
        return False
    if not stat.S_ISREG(wanted.st_mode):
        return False
    for descriptor in os.listdir("/proc/self/fd"):
        try:
            if os.path.samestat(os.fstat(int(descriptor)), wanted):
                return True
        except OSError:  # that of the listing itself
            continue
    inode = f" {wanted.st_ino} "
    with open("/proc/self/maps", encoding="utf-8", errors="surrogateescape") as lines:
        return any(inode in line and line.rstrip("\n").endswith(os.path.realpath(path)) for line in lines)


def _is_called_by_package() -> bool:
    caller = next(name for name in _callers() if name not in PATHS)
    return caller.startswith(PACKAGE) and not caller.startswith(f"{PACKAGE}tests")


def _callers() -> Iterator[str]:
    frame = sys._getframe(1)
    while frame is not None:
        yield frame.f_globals.get("__name__", "")
        frame = frame.f_back
    yield ""


def mask(patch: pytest.MonkeyPatch) -> None:
    """Take from ``os`` and the standard library what Windows lacks; the package's own modules are not changed."""
    _mask_standard_library(patch)
    for name in MODULES:
        patch.setitem(sys.modules, name, None)
    for name in (*FUNCTIONS, *FLAGS):
        patch.delattr(os, name, raising=False)
    for name, make in BEHAVIOURS.items():
        patch.setattr(os, name, make(getattr(os, name)))


def mask_modules(patch: pytest.MonkeyPatch) -> None:
    """Set what the package's modules looked up when they were imported."""
    for module, values in AT_IMPORT.items():
        for name, value in values.items():
            patch.setattr(importlib.import_module(PACKAGE + module), name, value)


def _mask_standard_library(patch: pytest.MonkeyPatch) -> None:
    """Modules that have chosen their functions by what this system has."""
    statvfs = os.statvfs

    def disk_usage(path):
        found = statvfs(path)
        block = found.f_frsize
        return shutil._ntuple_diskusage(
            found.f_blocks * block, (found.f_blocks - found.f_bfree) * block, found.f_bavail * block
        )

    patch.setattr(shutil, "disk_usage", disk_usage)
    patch.setattr(shutil, "_USE_CP_SENDFILE", False)
    patch.setattr(shutil, "_use_fd_functions", False)
    patch.setattr("_pytest.tmpdir.get_user_id", lambda: None)
    assert tempfile.gettempdir()


def pytest_addoption(parser):
    parser.addoption("--windows", action="store_true", help="take away what Windows lacks (tests/windows.py)")


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests(early_config):
    if not early_config.known_args_namespace.windows or WINDOWS:
        return
    if sys.platform != "linux":
        raise pytest.UsageError("--windows reads from /proc which files are open; run it on Linux.")
    # Imported with what this system has: they have an own implementation for Windows.
    for module in ("filelock", "multiprocessing.pool", "psutil", "torch", "hypothesis", "PIL.Image"):
        importlib.import_module(module)
    patch = pytest.MonkeyPatch()
    mask(patch)
    early_config.add_cleanup(patch.undo)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    if config.getoption("--windows") or WINDOWS:
        for item in items:
            if marker := item.get_closest_marker("posix"):
                item.add_marker(pytest.mark.skip(reason=marker.kwargs["reason"]))


@pytest.fixture
def windows(monkeypatch, request):
    """This test runs with what Windows has."""
    if not WINDOWS and not request.config.getoption("--windows"):
        if sys.platform != "linux":
            pytest.skip("the mask reads from /proc which files are open")
        mask(monkeypatch)
        mask_modules(monkeypatch)
