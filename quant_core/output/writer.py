"""Streaming writer: tensors in, a complete safetensors file under its final name at the end, or nothing.

The header comes first in the format, but what becomes of a layer may be known only when it was read (a NaN
keeps it in full precision). So room for the largest possible header is left free, tensors are appended, and the
header is written last, padded with the spaces that the format allows.

A run that can be told from others keeps a journal beside the partial file; the next run of the same goes on where it died.
"""

import contextlib
import errno
import filecmp
import json
import os
import secrets
import stat
import struct
import tempfile
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

import torch

from ..cancellation import CancelCheck, wait_for
from ..errors import OutputError, OutputExistsError
from ..sources.dtypes import DTYPE_NAMES, TORCH_DTYPES
from ..sources.source import TensorInfo
from .durable import to_disk
from .journal import Journal, checksum, write_all
from .staging import Staging, byte_views

try:
    import fcntl
except ImportError:  # Windows
    import msvcrt

    fcntl = None

__all__ = ["SafetensorsWriter", "final_path", "header_bytes", "keep_apart", "remove_leftovers"]

_WINDOWS = os.name == "nt"
_ALIGNMENT = 8
_LENGTH = struct.Struct("<Q")
_PARTIAL, _JOURNAL = ".partial", ".journal"
_SPILL = 1 << 24
_FLUSH = 1 << 26
_SYNC = (
    1 << 28
)  # bytes between two calls for the disk to have them; a power cut costs these and what it was behind with
_NO_MORE = "cannot schedule new futures"  # Python to who wants a thread when the process ends below a run: the next run goes on with it
_WORTH_A_THREAD = 1 << 16  # bytes that take longer to sum than to hand over
_LOCKED_BYTE = 2**31 - 2  # the last that Windows' own library can lock
_HELD = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES, errno.EDEADLK)  # what locking says of a file that another has
_ABANDONED = 86_400  # seconds after which a file that cannot be locked counts as a dead run's
_NO_LINKS = (errno.EPERM, errno.EACCES, errno.EMLINK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL)
_NO_FLUSH = (
    errno.EINVAL,
    errno.ENOTSUP,
    errno.EOPNOTSUPP,
    errno.ENOSYS,
    errno.EACCES,
    errno.EBADF,
)  # of a folder, on some disks
_WIDEST_OFFSET = 10**15


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _entry(info: TensorInfo, begin: int, end: int) -> dict:
    return {"dtype": DTYPE_NAMES[info.dtype], "shape": list(info.shape), "data_offsets": [begin, end]}


def _dump(header: Mapping) -> bytes:
    return json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()


def header_bytes(tensors: Iterable[tuple[str, TensorInfo]], metadata: Mapping[str, str]) -> int:
    """An upper bound of the header's size, wherever the tensors will lie."""
    header = {"__metadata__": dict(metadata)} | {
        name: _entry(info, _WIDEST_OFFSET, _WIDEST_OFFSET) for name, info in tensors
    }
    return _aligned(len(_dump(header)))


def _explain(error: OSError, path: Path) -> OutputError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return OutputError(
            f"The disk is full: {path} could not be written and nothing of it is left; free some space and run again."
        )
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return OutputError(f"The folder {path.parent} is read-only for this user; choose another output.")
    return OutputError(f"{path} cannot be written: {error.strerror or error}; check the disk and the folder.")


def _lock(file: BinaryIO) -> bool | None:
    """Hold the file for as long as this process lives. False when another does; None where the disk has no locks."""
    try:
        if fcntl:
            fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        else:
            file.seek(_LOCKED_BYTE)
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    except OSError as error:
        return False if error.errno in _HELD else None
    return True


def _dead(file: BinaryIO) -> bool:
    """Whether the run that wrote this partial file is over; holds the file from then on."""
    held = _lock(file)
    return bool(held) or held is None and time.time() - os.fstat(file.fileno()).st_mtime > _ABANDONED


def _sync(descriptors: Iterable[int]) -> None:
    """Wait until the disk has these files, and close them."""
    with contextlib.ExitStack() as opened:
        for descriptor in descriptors:
            opened.callback(os.close, descriptor)
        for descriptor in descriptors:
            to_disk(descriptor)


def _leftovers(path: Path, suffix: str) -> list[Path]:
    return sorted(path.parent.glob(f".{_escape(path.name)}.*{suffix}"))


def remove_leftovers(path: Path) -> int:
    """Remove partial files that dead runs towards ``path`` left behind; files of living runs stay. Returns how many."""
    removed = 0
    for partial in _leftovers(path, _PARTIAL):
        with contextlib.suppress(OSError), open(partial, "r+b") as handle:
            if _dead(handle):
                if _WINDOWS:
                    handle.close()  # no file is removed there that is open, nor one that another run takes up from here on
                partial.unlink()
                removed += 1
    for journal in _leftovers(path, _JOURNAL):
        if not journal.with_suffix(_PARTIAL).exists():
            with contextlib.suppress(OSError):
                journal.unlink()
    return removed


def _escape(name: str) -> str:
    return "".join(f"[{char}]" if char in "*?[" else char for char in name)


def final_path(path: str | os.PathLike) -> Path:
    """The file that a run towards ``path`` writes: a link is followed. Raises :class:`OutputError` where none can be."""
    path = Path(os.path.realpath(path) if os.path.islink(path) else path)
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return path
    except (OSError, ValueError) as error:  # a name that no disk takes
        raise _explain(error, path) from error
    if stat.S_ISDIR(mode):
        raise OutputError(f"{path} is a folder; give a file name.")
    if not stat.S_ISREG(mode):
        raise OutputError(f"{path} is no ordinary file but a device or a pipe; give a file name.")
    return path


def keep_apart(path: Path, others: Mapping[str, Iterable[Path | None]], what: str = "output") -> None:
    """Raises :class:`OutputError` where ``path``, which a run will write as its ``what``, is another of its files, under whatever name.

    ``others``: what they are to the run → where they lie, None for those that it has not.
    """
    for role, files in others.items():
        for file in filter(None, files):
            if os.path.realpath(path) == os.path.realpath(file) or (
                os.path.exists(path) and os.path.exists(file) and os.path.samefile(path, file)
            ):
                raise OutputError(f"{path} is the {role} itself; choose another {what}.")


class _Layout:
    """Where tensors lie: next in the file or, those of odd sizes, in the journal until they go behind all others.

    Attributes:
        entries: name → entry of the header.
        odd: (name, info, place in the journal) of those of odd sizes.
        end: bytes of the file, from where the header ends.
    """

    def __init__(self):
        self._names: set[str] = set()
        self.entries: dict[str, dict] = {}
        self.odd: list[tuple[str, TensorInfo, int]] = []
        self.end = 0

    def add(self, name: str, info: TensorInfo, begin: int) -> None:
        """Give a tensor its place; ``begin``: in the journal. Raises ValueError for a name that has one: a file can hold it once."""
        if name in self._names:
            raise ValueError(f"tensor {name} is written twice")
        self._names.add(name)
        if info.nbytes % _ALIGNMENT:
            self.odd.append((name, info, begin))
        else:
            self.append(name, info)

    def append(self, name: str, info: TensorInfo) -> None:
        """The next in the file."""
        self.entries[name] = _entry(info, self.end, self.end + info.nbytes)
        self.end += info.nbytes


class SafetensorsWriter:
    """Write tensors in any order to a hidden partial file beside ``path``; :meth:`finish` makes it ``path``.

    Leaving the context without :meth:`finish` removes the partial file. Peak memory is that of one tensor. One thread writes; another
    may :meth:`abort` meanwhile. What a dead run left is read, and all is flushed at the end, by a thread of the writer's own.

    Args:
        path: final name; its folder is made when missing, a link is followed.
        reserve: bytes to leave for the header, from :func:`header_bytes`.
        run: equal for runs that write the same bytes; what such a run had noted when it died is taken up. None: for no run.
        overwrite: replace a file that is there; otherwise :meth:`finish` refuses to, unless it is the same.
        unfinished: the name that the hidden files bear until then, in the folder of ``path``; by default that of ``path``.
        check: called while that thread works; raises to cancel, which waits for nothing and leaves what lay there before, or the whole file.
        parse: makes of a note what :attr:`notes` holds; whatever is wrong with one, it and all after it is not taken up.

    Attributes:
        notes: what was taken up, as ``parse`` made it; its tensors are not to be added again.
        lasting: whether the next run may go on with what this one notes.
        stood: a file of the same contents was there when this one was finished, and was left.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        reserve: int,
        run: str | None = None,
        *,
        overwrite: bool = True,
        unfinished: str | None = None,
        check: CancelCheck = lambda: None,
        parse: Callable[[object], object] = lambda note: note,
    ):
        self.path = final_path(path)
        self._named = self.path.with_name(unfinished or self.path.name)
        self.notes: list[object] = []
        self._layout = _Layout()
        self._staging = Staging()
        self._reserve = _aligned(reserve)
        self._begin = _LENGTH.size + self._reserve
        self._flushing = self._synced = 0
        self._file = self._partial = self._journal = None
        self._beside = ThreadPoolExecutor(
            3, thread_name_prefix="learned-rounding-disk"
        )  # one opens or finishes, one sums, one waits for the disk
        self._syncing: Future | None = None
        self.lasting, self._overwrite, self._check, self._parse = run is not None, overwrite, check, parse
        self._writing, self._over, self._left, self.stood = threading.Lock(), False, False, False
        self._made = [folder for folder in self.path.parents if not os.path.lexists(folder)]
        try:
            wait_for(self._beside.submit(self._open, run), check)
        except BaseException:
            self.abort()
            raise

    def _open(self, run: str | None) -> None:
        with self._access():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if run is None or not any(self._take_up(partial, run) for partial in _leftovers(self._named, _PARTIAL)):
                self._start(run)

    def _start(self, run: str | None) -> None:
        while True:
            self._partial = self.path.with_name(f".{self._named.name}.{secrets.token_hex(4)}{_PARTIAL}")
            self._file = open(self._partial, "xb", buffering=0)
            if _lock(self._file) is not False and os.fstat(self._file.fileno()).st_nlink:
                break
            self._file.close()  # another run has taken the new file for a dead one's, and removes it
            self._partial.unlink(missing_ok=True)
        self._file.seek(self._begin)
        if run is None:
            self._journal = Journal(tempfile.SpooledTemporaryFile(max_size=_SPILL, dir=self.path.parent))
        else:
            self._journal = Journal(open(self._partial.with_suffix(_JOURNAL), "x+b", buffering=0))
            self._journal.append([run, self._reserve])

    def _take_up(self, partial: Path, run: str) -> bool:
        """Go on with the partial file of a dead run; False where it lives, was another, left nothing whole, or cannot be read."""
        with contextlib.ExitStack() as opened:
            try:
                file = opened.enter_context(open(partial, "r+b", buffering=0))
                journal = Journal(opened.enter_context(open(partial.with_suffix(_JOURNAL), "r+b", buffering=0)))
                if (
                    not _dead(file) or os.fstat(file.fileno()).st_nlink != 1
                ):  # 0: removed meanwhile; 2: published already
                    return False
                layout, notes, cut = self._whole(file, journal, run)
                if not notes:
                    return False
                file.truncate(self._begin + layout.end)
                file.seek(self._begin + layout.end)
                journal.cut(cut)
            except OSError:
                return False
            opened.pop_all()
        self._file, self._journal, self._partial, self._layout, self.notes = file, journal, partial, layout, notes
        self._flushing, self._synced = layout.end, self._taken()
        return True

    def _whole(self, file: BinaryIO, journal: Journal, run: str) -> tuple[_Layout, list[object], int]:
        """Where the tensors lie that such a run has left whole, its notes, and where in the journal that ends."""
        layout, notes, cut, end, since = _Layout(), [], 0, 0, []
        records = journal.records()
        with contextlib.suppress(
            KeyError, IndexError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError
        ):  # no record of ours
            if next(records, ([],))[0] != [run, self._reserve]:
                return layout, notes, cut
            for record, begin, size in records:
                self._check_open()
                if "note" in record:
                    note = self._parse(record["note"])
                    for tensor in since:
                        layout.add(*tensor)
                    notes.append(note)
                    cut, since = begin + size, []
                    continue
                info = TensorInfo(TORCH_DTYPES[record["dtype"]], tuple(record["shape"]))
                odd = info.nbytes % _ALIGNMENT
                where, place = (journal.file, begin) if odd else (file, self._begin + end)
                where.seek(place)
                crc = checksum(where, info.nbytes)
                if crc is None or crc != record["crc"]:
                    break
                end += 0 if odd else info.nbytes
                record["name"].encode()  # raises for what is no name
                since.append((record["name"], info, begin))
        return layout, notes, cut

    @contextlib.contextmanager
    def _access(self):
        """For who uses the files: errors by name, and the end of what :meth:`abort` could not end meanwhile."""
        try:
            with self._writing:
                self._check_open()
                yield
        except OSError as error:
            self.abort()
            raise _explain(error, self.path) from error
        finally:
            if self._over:
                self._close()

    def _check_open(self) -> None:
        if self._over:
            raise OutputError(f"{self.path} is not written any more: its run is over.")

    def add(self, name: str, tensor: torch.Tensor) -> int:
        """Append one tensor; returns its size in bytes. Raises ValueError where one of that name was added before."""
        info = TensorInfo(tensor.dtype, tuple(tensor.shape))
        views = byte_views(tensor, self._staging)
        record = {"name": name, "dtype": DTYPE_NAMES[info.dtype], "shape": info.shape}
        with self._access():
            if info.nbytes % _ALIGNMENT:
                # Readers want every tensor aligned to its item size and no gaps: such sizes go to the end.
                payload = b"".join(views)
                begin = self._journal.append(record | {"crc": zlib.crc32(payload)}, payload)
            else:
                begin = self._journal.append(record | {"crc": self._append(views)})
            self._layout.add(name, info, begin)
            self._flush()
        return info.nbytes

    def note(self, value: object) -> None:
        """All tensors since the last note belong together; ``value`` (JSON) is what another run needs to know of them."""
        with self._access():
            self._journal.append({"note": value})
            if self.lasting and self._taken() - self._synced >= _SYNC:
                self._sync_beside()

    def _taken(self) -> int:
        """Bytes in both files."""
        return self._layout.end + self._journal.file.tell()

    def _append(self, views: Iterable[memoryview]) -> int:
        """Returns the checksum, which is made while the system takes the bytes."""
        crc = 0
        for view in views:
            self._check_open()
            if len(view) < _WORTH_A_THREAD:
                write_all(self._file, view)
                crc = zlib.crc32(view, crc)
                continue
            summed = self._beside.submit(zlib.crc32, view, crc)
            try:
                write_all(self._file, view)
            finally:
                crc = summed.result()  # the view's memory is used again
        return crc

    def _sync_beside(self) -> None:
        """Have what is written so far survive a power cut, without waiting for it; does nothing while the disk is still behind."""
        if self._syncing is not None:
            if not self._syncing.done():
                return
            self._syncing.result()
        else:
            self._sync_folder()
        with contextlib.ExitStack() as opened:  # descriptors of their own, so that the files may be closed meanwhile
            copies = []
            for file in (self._file, self._journal.file):
                copies.append(os.dup(file.fileno()))
                opened.callback(os.close, copies[-1])
            self._syncing = self._beside.submit(_sync, copies)
            opened.pop_all()
        self._synced = self._taken()

    def _flush(self) -> None:
        end = self._layout.end
        if end - self._flushing >= _FLUSH and hasattr(os, "posix_fadvise"):
            # Starts writing to the disk now, beside the computation, so that the final fsync finds little left.
            os.posix_fadvise(
                self._file.fileno(), self._begin + self._flushing, end - self._flushing, os.POSIX_FADV_DONTNEED
            )
            self._flushing = end

    def _sync_folder(self) -> None:
        """Make names in the folder durable, where the disk can."""
        if os.name == "posix":
            try:
                folder = os.open(self.path.parent, os.O_RDONLY)
                try:
                    to_disk(folder)
                finally:
                    os.close(folder)
            except OSError as error:
                if error.errno not in _NO_FLUSH:
                    raise

    def finish(self, metadata: Mapping[str, str]) -> int:
        """Write the header, flush to disk and give the file its name; returns its size in bytes.

        Raises:
            OutputExistsError: a file of that name, and of other contents, is there and may not be overwritten.
            OutputError: the disk failed, and nothing is left; or it failed when all was done, and the sentence says so.
        """
        return wait_for(self._beside.submit(self._finish, metadata), self._check)

    def _finish(self, metadata: Mapping[str, str]) -> int:
        layout = self._layout
        with self._access():
            for name, info, begin in sorted(layout.odd, key=lambda odd: -odd[1].dtype.itemsize):
                self._append([memoryview(self._journal.payload(begin, info.nbytes))])
                layout.append(name, info)
            header = _dump({"__metadata__": dict(metadata)} | layout.entries)
            if len(header) > self._reserve:
                raise AssertionError(f"the header needs {len(header)} bytes and {self._reserve} were reserved")
            self._file.seek(0)
            write_all(self._file, _LENGTH.pack(self._reserve) + header.ljust(self._reserve))
            size = os.fstat(self._file.fileno()).st_size
            if size != self._begin + layout.end:
                raise OSError(errno.EIO, f"its partial file has {size:,} bytes instead of {self._begin + layout.end:,}")
            if self._syncing is not None:
                self._syncing.result()  # the system tells of a failure once
            to_disk(self._file.fileno())
            self._check_open()
            self._publish()
            self._over = True
            try:
                self._sync_folder()
            except OSError as error:
                raise OutputError(
                    f"{self.path} is complete, but the disk does not confirm its name ({error.strerror or error}): it may be lost if the power "
                    "fails now; check the disk."
                ) from error
        return self._begin + layout.end

    def _publish(self) -> None:
        """Give the partial file its name, before it is closed: an unlocked one would be taken for a dead run's."""
        if _WINDOWS:
            self._file.close()  # Windows renames no open file
        try:
            if self._overwrite:
                os.replace(self._partial, self.path)
            else:
                self._link()
        except FileExistsError as error:
            if not filecmp.cmp(self._partial, self.path, shallow=False):
                raise OutputExistsError(
                    f"{self.path} exists and was made from something else; choose another output or overwrite it."
                ) from error
            self.stood = True
            with contextlib.suppress(OSError):
                os.utime(self.path)  # newer than its source again, so that the next run need not make it again to know

    def _link(self) -> None:
        """As a renaming that raises FileExistsError instead of replacing; ours goes when the run is closed."""
        if _WINDOWS:
            os.rename(self._partial, self.path)
            return
        try:
            os.link(self._partial, self.path)
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            if os.path.lexists(self.path):
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST)) from error
            os.replace(
                self._partial, self.path
            )  # a disk without links: a file made since the line before would be lost

    def _close(self) -> None:
        """Remove what is not to stay and close the files; who still writes does it again when the write is over."""
        self._remove()
        if self._writing.acquire(blocking=False):
            try:
                self._beside.shutdown(wait=False)
                for file in (self._file, self._journal and self._journal.file):
                    with contextlib.suppress(OSError):
                        if file is not None:
                            file.close()
            finally:
                self._writing.release()
            if _WINDOWS:  # which removes no open file
                self._remove()

    def _remove(self) -> None:
        """The partial file, the journal, and folders made for nothing; a disk that refuses leaves it to the next run."""
        if self._left:
            return
        removals = [(os.rmdir, folder) for folder in self._made]
        if self._partial is not None:
            removals = [(os.unlink, self._partial), (os.unlink, self._partial.with_suffix(_JOURNAL)), *removals]
        for remove, path in removals:
            with contextlib.suppress(OSError):
                remove(path)

    def abort(self) -> None:
        """Remove the partial file, without waiting for a write under way; does nothing after :meth:`finish`."""
        if not self._over:
            self._over = True
            self._close()

    def __enter__(self) -> "SafetensorsWriter":
        return self

    def __exit__(self, kind, error, trace) -> None:
        self._left = self.lasting and isinstance(error, RuntimeError) and _NO_MORE in str(error)
        self.abort()
