"""Hidden partial files: created next to the output, locked while their run lives, published or removed at its end.

The lock is on the partial file itself (flock, LockFileEx), so the system releases it when the process ends. A partial file
without a lock belongs to a killed run: another run may resume it from the journal next to it, or remove both.
"""

import contextlib
import errno
import glob
import hashlib
import io
import os
import secrets
import stat
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import IO, ParamSpec, TypeVar

from filelock import lock_descriptor

from ..errors import OutputError
from ..file_system import WINDOWS, remove_file
from .durable import flush_to_disk
from .publish import final_path, flush_folder, output_error, publish_file

__all__ = [
    "JOURNAL_SUFFIX",
    "PartialFile",
    "check_leftover",
    "claim_partial",
    "leftover_bytes",
    "lock_file",
    "open_leftover",
    "remove_leftovers",
]

PARTIAL_SUFFIX, JOURNAL_SUFFIX = ".partial", ".journal"
_ABANDONED = 86_400  # s without a write, after which a partial file on a disk without locks belongs to a killed run
_NAME_BYTES = 255  # longest file name of most file systems
_MARK_BYTES = 4  # random bytes in a hidden name
_NO_FOLLOW = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
_PATIENCE = 2 if WINDOWS else 0  # s that abort() waits for a write: Windows removes no open file
_THREADS = 3  # one opens or publishes the file, one starts to write it to the disk, one flushes
_P = ParamSpec("_P")
_T = TypeVar("_T")


def lock_file(file: IO[bytes]) -> bool | None:
    """Lock a file until it is closed or the process ends; False if it is locked, None if the disk has no locks."""
    try:
        return lock_descriptor(file.fileno(), blocking=False)
    except OSError:
        return None


def claim_partial(file: IO[bytes]) -> bool:
    """Lock the partial file of a killed run; False if its run is active."""
    locked = lock_file(file)
    return bool(locked) or (locked is None and time.time() - os.fstat(file.fileno()).st_mtime > _ABANDONED)


def _open_hidden(path: Path) -> io.FileIO:
    """Open a hidden file for reading and writing; a link is not followed, and a named pipe does not block."""
    if not stat.S_ISREG(os.lstat(path).st_mode):  # also where the system has no O_NOFOLLOW
        raise OSError(errno.ELOOP, "not a regular file")
    return open(path, "r+b", buffering=0, opener=lambda name, flags: os.open(name, flags | _NO_FOLLOW))


def open_leftover(path: Path) -> io.FileIO:
    """Open a hidden file of a killed run, see :func:`check_leftover`. Raises OSError."""
    file = _open_hidden(path)
    try:
        check_leftover(file, path)
    except BaseException:
        file.close()
        raise
    return file


def check_leftover(file: IO[bytes], path: Path) -> None:
    """Raise OSError unless ``file`` is the regular file at ``path``, has no other name and belongs to this user.

    Otherwise another user, or a link to another file, could decide what a run continues, or where it writes.
    """
    status = os.fstat(file.fileno())
    if not (_is_at(status, path) and stat.S_ISREG(status.st_mode) and status.st_nlink == 1):
        raise OSError(errno.ESTALE, "not the only name of a regular file")
    if hasattr(os, "geteuid") and status.st_uid != os.geteuid():
        with tempfile.TemporaryFile(dir=path.parent) as own:  # some network disks give all files the same owner
            if os.fstat(own.fileno()).st_uid != status.st_uid:
                raise OSError(errno.EPERM, "owned by another user")


def _is_at(status: os.stat_result, path: Path) -> bool:
    """Whether the open file with this status is still the one that ``path`` names."""
    try:
        return os.path.samestat(status, os.lstat(path))
    except FileNotFoundError:
        return False


def _hidden_stem(name: str) -> str:
    """What the names of hidden files contain: ``name``, or a part of it and its hash if they would be too long."""
    room = _NAME_BYTES - len(f"..{'0' * 2 * _MARK_BYTES}{PARTIAL_SUFFIX}")
    encoded = os.fsencode(name)
    if len(encoded) <= room:
        return name
    digest = hashlib.blake2b(encoded, digest_size=8).hexdigest()
    return encoded[: room - len(digest)].decode(errors="ignore") + digest


def _leftovers(path: Path, suffix: str) -> list[Path]:
    return sorted(path.parent.glob(f".{glob.escape(_hidden_stem(path.name))}.*{suffix}"))


def leftover_bytes(path: Path) -> int:
    """Bytes that the partial files of other runs with the output ``path`` have: a run may resume one of them."""
    total = 0
    for partial in _leftovers(path, PARTIAL_SUFFIX):
        with contextlib.suppress(OSError):
            total += partial.lstat().st_size
    return total


def remove_leftovers(path: Path) -> int:
    """Remove partial files and journals of killed runs with the output ``path``; returns the number of partial files.

    Links and pipes with such a name are no files of a run and are removed too; what a link refers to is not touched.
    """
    removed = 0
    for partial in _leftovers(path, PARTIAL_SUFFIX):
        with contextlib.suppress(OSError), contextlib.ExitStack() as opened:
            if stat.S_ISREG(partial.lstat().st_mode):
                file = opened.enter_context(_open_hidden(partial))
                if not claim_partial(file):
                    continue
                if WINDOWS:
                    file.close()  # Windows removes no open file, and refuses if another run opens it from here on
            partial.unlink()
            removed += 1
    for journal in _leftovers(path, JOURNAL_SUFFIX):
        if not journal.with_suffix(PARTIAL_SUFFIX).is_file():
            with contextlib.suppress(OSError):
                journal.unlink()
    return removed


class PartialFile:
    """The hidden, locked file of one output, with the journal next to it if there is one.

    One thread writes at a time, inside :meth:`access`; any thread may :meth:`abort` meanwhile, without waiting for the disk
    (on Windows for two seconds at most).

    Args:
        path: final name; a symbolic link is followed.
        hidden_name: name that the hidden file names contain; None for that of ``path``.
        overwrite: replace an existing file of other content.

    Attributes:
        path: final path.
        file: the open partial file, unbuffered.
        matched_existing: the output already existed with the same content, and was left in place.
    """

    file: io.FileIO

    def __init__(self, path: str | os.PathLike, *, hidden_name: str | None = None, overwrite: bool = True):
        self.path = final_path(path)
        self.matched_existing = False
        self._overwrite = overwrite
        self._prefix = self.path.with_name(hidden_name or self.path.name)
        self._hidden: Path | None = None
        self._files: list[IO[bytes]] = []
        self._created_folders = [folder for folder in self.path.parents if not os.path.lexists(folder)]
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="learned-rounding-disk")
        self._writing = threading.Lock()
        self._ended = self._kept = False

    @property
    def journal_path(self) -> Path:
        """Where the journal of this partial file is."""
        assert self._hidden is not None
        return self._hidden.with_suffix(JOURNAL_SUFFIX)

    def leftovers(self) -> list[Path]:
        """Partial files of other runs, active or killed, with the same output."""
        return _leftovers(self._prefix, PARTIAL_SUFFIX)

    def create(self) -> None:
        """Create and lock a new partial file, and its folder if it is missing."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        while True:
            stem, mark = _hidden_stem(self._prefix.name), secrets.token_hex(_MARK_BYTES)
            self._hidden = self.path.with_name(f".{stem}.{mark}{PARTIAL_SUFFIX}")
            self.file = open(self._hidden, "x+b", buffering=0)
            if lock_file(self.file) is not False and os.fstat(self.file.fileno()).st_nlink:
                break
            self.file.close()  # another run claimed the new file before it was locked, and removes it
            remove_file(self._hidden)
        self._files.append(self.file)

    def adopt(self, hidden: Path, file: io.FileIO) -> None:
        """Continue with a partial file that :func:`open_leftover` opened and :func:`claim_partial` has locked."""
        self._hidden, self.file = hidden, file
        self._files.append(file)

    def attach(self, file: IO[bytes]) -> None:
        """Close ``file``, the journal or a temporary file, together with the partial file."""
        self._files.append(file)

    def submit(self, function: Callable[_P, _T], *args: _P.args, **options: _P.kwargs) -> "Future[_T]":
        """Run a function on a thread of this file."""
        future = self._threads.submit(function, *args, **options)
        if WINDOWS:  # which removes no open file: a flush that ends after abort() had one open
            future.add_done_callback(lambda _: self._remove() if self._ended else None)
        return future

    @contextlib.contextmanager
    def access(self) -> Iterator[None]:
        """Exclusive access for one thread; an OSError inside aborts and becomes an :class:`OutputError`."""
        try:
            with self._writing:
                self.check_open()
                yield
        except OSError as error:
            self.abort()
            raise output_error(error, self.path) from error
        finally:
            if self._ended:
                self._close()  # what abort() could not close while this thread was writing

    def check_open(self) -> None:
        """Raise :class:`OutputError` after :meth:`abort`."""
        if self._ended:
            raise OutputError(f"{self.path} is not written any more: its run has ended.")

    def publish(self, size: int) -> None:
        """Flush the complete file of ``size`` bytes and give it its final name; to be called inside :meth:`access`.

        Raises:
            OutputExistsError: a file of other content has the name and must not be overwritten.
            OutputError: the name may be lost in a power failure.
            OSError: the disk failed; nothing is published.
        """
        assert self._hidden is not None
        status = os.fstat(self.file.fileno())
        if status.st_size != size:
            raise OSError(errno.EIO, f"the partial file has {status.st_size:,} bytes instead of {size:,}")
        flush_to_disk(self.file.fileno())
        self.check_open()
        if not (WINDOWS or _is_at(status, self._hidden)):  # Windows neither removes nor renames an open file
            raise OSError(errno.ESTALE, f"its hidden file {self._hidden.name} was removed or replaced during the run")
        if WINDOWS:
            # Windows renames no open file, and a closed one has no lock: until it has its name, another run with this output
            # may take it for that of a killed run. If it resumes from it, the file is open there and the name is refused here;
            # if it removes it, this run fails. In neither case a file is published that another run writes.
            self.file.close()
        # Elsewhere the file keeps its lock until it has its name: an unlocked one would look like that of a killed run.
        try:
            self.matched_existing = not publish_file(self._hidden, self.path, overwrite=self._overwrite)
        except PermissionError:  # Windows replaces no open file; the next run then finds the layers finished
            self._ended, self._kept = True, WINDOWS and self.journal_path.is_file()
            raise
        if self.matched_existing:
            with contextlib.suppress(OSError):
                os.utime(self.path)  # newer than its source again, so that the next run need not repeat the work
        self._ended = True
        try:
            flush_folder(self.path.parent)
        except OSError as error:
            raise OutputError(
                f"{self.path} is complete, but the disk does not confirm its name ({error.strerror or error}): it may be lost "
                "if the power fails now; check the disk."
            ) from error

    def abort(self, *, keep: bool = False) -> None:
        """Remove the hidden files without waiting for a write in progress; does nothing after :meth:`publish`.

        ``keep``: leave them for a run that resumes.
        """
        if not self._ended:
            self._ended, self._kept = True, keep
            self._close()

    def _close(self) -> None:
        """Remove the hidden files and close them; a thread that is still writing calls this again at its end."""
        self._remove()
        if self._writing.acquire(timeout=_PATIENCE):
            try:
                self._threads.shutdown(wait=False)
                for file in self._files:
                    with contextlib.suppress(OSError):
                        file.close()
            finally:
                self._writing.release()
            if WINDOWS:  # which removes no open file
                self._remove()

    def _remove(self) -> None:
        """Remove the hidden files and folders created in vain; if the disk refuses, the next run removes them."""
        if self._kept:
            return
        removals: list[tuple[Callable[[Path], None], Path]] = [(os.rmdir, folder) for folder in self._created_folders]
        if self._hidden is not None:
            removals = [(os.unlink, self._hidden), (os.unlink, self.journal_path), *removals]
        for remove, path in removals:
            with contextlib.suppress(OSError):
                remove(path)
