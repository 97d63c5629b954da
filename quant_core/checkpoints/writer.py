"""Streaming writer: tensors in, a complete safetensors file under its final name at the end, or nothing.

The header comes first in the format, but what becomes of a layer may be known only when it was read (a NaN
keeps it in full precision). So room for the largest possible header is left free, tensors are appended, and the
header is written last, padded with the spaces that the format allows.

A run that can be told from others keeps a journal beside the partial file; the next run of the same goes on where it died.
"""

import contextlib
import errno
import json
import os
import secrets
import struct
import tempfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

import torch

from ..errors import OutputError
from .dtypes import DTYPE_NAMES, TORCH_DTYPES
from .journal import Journal, checksum, write_all
from .source import TensorInfo
from .staging import Staging, byte_views

try:
    import fcntl
except ImportError:  # Windows
    import msvcrt

    fcntl = None

__all__ = ["SafetensorsWriter", "header_bytes", "remove_leftovers"]

_ALIGNMENT = 8
_LENGTH = struct.Struct("<Q")
_PARTIAL, _JOURNAL = ".partial", ".journal"
_SPILL = 1 << 24
_FLUSH = 1 << 26
_SYNC = 1 << 28  # bytes between two calls for the disk to have them; a power cut costs these and what it was behind with
_WORTH_A_THREAD = 1 << 16  # bytes that take longer to sum than to hand over
_LOCKED_BYTE = 2**31 - 2  # the last that Windows' own library can lock
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


def _lock(file: BinaryIO) -> bool:
    """Hold the file for as long as this process lives; False when another does, or has removed it."""
    try:
        if fcntl:
            fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        else:
            file.seek(_LOCKED_BYTE)
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    except OSError:
        return False
    return bool(os.fstat(file.fileno()).st_nlink)


def _sync(descriptors: Iterable[int]) -> None:
    """Wait until the disk has these files, and close them."""
    with contextlib.ExitStack() as opened:
        for descriptor in descriptors:
            opened.callback(os.close, descriptor)
        for descriptor in descriptors:
            os.fsync(descriptor)


def _leftovers(path: Path, suffix: str) -> list[Path]:
    return sorted(path.parent.glob(f".{_escape(path.name)}.*{suffix}"))


def remove_leftovers(path: Path) -> int:
    """Remove partial files that dead runs towards ``path`` left behind; files of living runs stay. Returns how many."""
    removed = 0
    for partial in _leftovers(path, _PARTIAL):
        with contextlib.suppress(OSError), open(partial, "r+b") as handle:
            if _lock(handle):
                partial.unlink()
                removed += 1
    for journal in _leftovers(path, _JOURNAL):
        if not journal.with_suffix(_PARTIAL).exists():
            with contextlib.suppress(OSError):
                journal.unlink()
    return removed


def _escape(name: str) -> str:
    return "".join(f"[{char}]" if char in "*?[" else char for char in name)


class SafetensorsWriter:
    """Write tensors in any order to a hidden partial file beside ``path``; :meth:`finish` makes it ``path``.

    Leaving the context without :meth:`finish` removes the partial file. Peak memory is that of one tensor.

    Args:
        path: final name; its folder is made when missing.
        reserve: bytes to leave for the header, from :func:`header_bytes`.
        run: equal for runs that write the same bytes; what such a run had noted when it died is taken up. None: for no run.

    Attributes:
        notes: what was taken up, as :meth:`note` was given it; its tensors are not to be added again.
    """

    def __init__(self, path: str | os.PathLike, reserve: int, run: str | None = None):
        self.path = Path(path)
        self.notes: list[object] = []
        self._entries: dict[str, dict] = {}
        self._staging = Staging()
        self._odd: list[tuple[str, TensorInfo, int]] = []
        self._reserve = _aligned(reserve)
        self._begin = _LENGTH.size + self._reserve
        self._end = self._flushing = self._synced = 0
        self._partial = self._journal = None
        self._beside = ThreadPoolExecutor(2, thread_name_prefix="learned-rounding-disk")  # one sums while another waits for the disk
        self._syncing: Future | None = None
        self._lasting = run is not None
        with self._errors():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if run is None or not any(self._take_up(partial, run) for partial in _leftovers(self.path, _PARTIAL)):
                self._start(run)

    def _start(self, run: str | None) -> None:
        held = False
        while not held:  # another run may have taken the new file for a dead one's before it was locked
            partial = self.path.with_name(f".{self.path.name}.{secrets.token_hex(4)}{_PARTIAL}")
            self._file = open(partial, "xb", buffering=0)
            self._partial = partial
            held = _lock(self._file) or partial.exists()  # some network disks have no locks
            if not held:
                self._file.close()
        self._file.seek(self._begin)
        if run is None:
            self._journal = Journal(tempfile.SpooledTemporaryFile(max_size=_SPILL, dir=self.path.parent))
        else:
            self._journal = Journal(open(partial.with_suffix(_JOURNAL), "x+b", buffering=0))
            self._journal.append([run, self._reserve])

    def _take_up(self, partial: Path, run: str) -> bool:
        """Go on with the partial file of a dead run; False where it lives, was another, or left nothing whole."""
        with contextlib.ExitStack() as opened:
            try:
                file = opened.enter_context(open(partial, "r+b", buffering=0))
                journal = Journal(opened.enter_context(open(partial.with_suffix(_JOURNAL), "r+b", buffering=0)))
                if not _lock(file):
                    return False
                records = journal.records()
                if next(records, ([],))[0] != [run, self._reserve]:
                    return False
                cut = self._restore(file, journal, records)
                if not self.notes:
                    return False
                file.truncate(self._begin + self._end)
                file.seek(self._begin + self._end)
                journal.cut(cut)
            except OSError:
                return False
            opened.pop_all()
        self._file, self._journal, self._partial = file, journal, partial
        self._flushing = self._synced = self._end
        return True

    def _restore(self, file: BinaryIO, journal: Journal, records: Iterator[tuple[object, int, int]]) -> int:
        """Count all that is whole as added; returns where in the journal it ends."""
        cut, end, since = 0, 0, []
        for record, begin, size in records:
            if "note" in record:
                for name, info, place in since:
                    self._place(name, info, place)
                self.notes.append(record["note"])
                cut, since = begin + size, []
                continue
            info = TensorInfo(TORCH_DTYPES[record["dtype"]], tuple(record["shape"]))
            odd = info.nbytes % _ALIGNMENT
            where, place = (journal.file, begin) if odd else (file, self._begin + end)
            where.seek(place)
            if checksum(where, info.nbytes) != record["crc"]:
                break
            end += 0 if odd else info.nbytes
            since.append((record["name"], info, begin))
        return cut

    @contextlib.contextmanager
    def _errors(self):
        try:
            yield
        except OSError as error:
            self.abort()
            raise _explain(error, self.path) from error

    def add(self, name: str, tensor: torch.Tensor) -> int:
        """Append one tensor; returns its size in bytes."""
        info = TensorInfo(tensor.dtype, tuple(tensor.shape))
        views = byte_views(tensor, self._staging)
        record = {"name": name, "dtype": DTYPE_NAMES[info.dtype], "shape": info.shape}
        with self._errors():
            if info.nbytes % _ALIGNMENT:
                # Readers want every tensor aligned to its item size and no gaps: such sizes go to the end.
                payload = b"".join(views)
                begin = self._journal.append(record | {"crc": zlib.crc32(payload)}, payload)
            else:
                begin = self._journal.append(record | {"crc": self._append(views)})
            self._place(name, info, begin)
            self._flush()
        return info.nbytes

    def note(self, value: object) -> None:
        """All tensors since the last note belong together; ``value`` (JSON) is what another run needs to know of them."""
        with self._errors():
            self._journal.append({"note": value})
            if self._lasting and self._end - self._synced >= _SYNC:
                self._sync_beside()

    def _place(self, name: str, info: TensorInfo, begin: int) -> None:
        """Give a tensor its place: next in the file or, where its size is odd, behind all others; ``begin``: in the journal."""
        if info.nbytes % _ALIGNMENT:
            self._odd.append((name, info, begin))
        else:
            self._entries[name] = _entry(info, self._end, self._end + info.nbytes)
            self._end += info.nbytes

    def _append(self, views: Iterable[memoryview]) -> int:
        """Returns the checksum, which is made while the system takes the bytes."""
        crc = 0
        for view in views:
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
        # Of their own, so that the files may be closed meanwhile.
        self._syncing = self._beside.submit(_sync, [os.dup(file.fileno()) for file in (self._file, self._journal.file)])
        self._synced = self._end

    def _flush(self) -> None:
        if self._end - self._flushing >= _FLUSH and hasattr(os, "posix_fadvise"):
            # Starts writing to the disk now, beside the computation, so that the final fsync finds little left.
            os.posix_fadvise(
                self._file.fileno(), self._begin + self._flushing, self._end - self._flushing, os.POSIX_FADV_DONTNEED
            )
            self._flushing = self._end

    def _sync_folder(self) -> None:
        """Make names in the folder durable."""
        if os.name == "posix":
            folder = os.open(self.path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)

    def finish(self, metadata: Mapping[str, str]) -> int:
        """Write the header, flush to disk and rename; returns the file's size in bytes."""
        with self._errors():
            for name, info, begin in sorted(self._odd, key=lambda odd: -odd[1].dtype.itemsize):
                self._append([memoryview(self._journal.payload(begin, info.nbytes))])
                self._entries[name] = _entry(info, self._end, self._end + info.nbytes)
                self._end += info.nbytes
            header = _dump({"__metadata__": dict(metadata)} | self._entries)
            if len(header) > self._reserve:
                raise AssertionError(f"the header needs {len(header)} bytes and {self._reserve} were reserved")
            self._file.seek(0)
            write_all(self._file, _LENGTH.pack(self._reserve) + header.ljust(self._reserve))
            if self._syncing is not None:
                self._syncing.result()  # the system tells of a failure once
            os.fsync(self._file.fileno())
            self._file.close()
            os.replace(self._partial, self.path)
            self._sync_folder()
            self._forget()
        return self._begin + self._end

    def _forget(self) -> None:
        """Remove the journal, end the threads."""
        self._beside.shutdown(wait=False)
        if self._journal is not None:
            with contextlib.suppress(OSError):
                self._journal.file.close()
        self._partial.with_suffix(_JOURNAL).unlink(missing_ok=True)

    def abort(self) -> None:
        """Remove the partial file; does nothing after :meth:`finish`."""
        if self._partial is None:
            return
        with contextlib.suppress(OSError):
            self._file.close()
        self._partial.unlink(missing_ok=True)
        self._forget()

    def __enter__(self) -> "SafetensorsWriter":
        return self

    def __exit__(self, *exc) -> None:
        self.abort()
