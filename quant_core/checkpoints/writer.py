"""Streaming writer: tensors in, a complete safetensors file under its final name at the end, or nothing.

The header comes first in the format, but what becomes of a layer may be known only when it was read (a NaN
keeps it in full precision). So room for the largest possible header is left free, tensors are appended, and the
header is written last, padded with the spaces that the format allows.
"""

import contextlib
import errno
import json
import os
import secrets
import struct
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from ..errors import OutputError
from .dtypes import DTYPE_NAMES
from .source import TensorInfo
from .staging import Staging, byte_views

try:
    import fcntl
except ImportError:  # Windows: a file that another process holds open cannot be removed anyway
    fcntl = None

__all__ = ["SafetensorsWriter", "header_bytes", "remove_leftovers"]

_ALIGNMENT = 8
_LENGTH = struct.Struct("<Q")
_PARTIAL = ".partial"
_SPILL = 1 << 24
_FLUSH = 1 << 26
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


def _lock(descriptor: int) -> bool:
    """Hold the file for as long as this process lives; False when another does."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except OSError:
        return False


def remove_leftovers(path: Path) -> int:
    """Remove partial files that dead runs towards ``path`` left behind; files of living runs stay. Returns how many."""
    removed = 0
    for leftover in path.parent.glob(f".{_escape(path.name)}.*{_PARTIAL}"):
        with contextlib.suppress(OSError), open(leftover, "rb") as handle:
            if _lock(handle.fileno()):
                leftover.unlink()
                removed += 1
    return removed


def _escape(name: str) -> str:
    return "".join(f"[{char}]" if char in "*?[" else char for char in name)


class SafetensorsWriter:
    """Write tensors in any order to a hidden partial file beside ``path``; :meth:`finish` makes it ``path``.

    Leaving the context without :meth:`finish` removes the partial file. Peak memory is that of one tensor.

    Args:
        path: final name; its folder is made when missing.
        reserve: bytes to leave for the header, from :func:`header_bytes`.
    """

    def __init__(self, path: str | os.PathLike, reserve: int):
        self.path = Path(path)
        self._entries: dict[str, dict] = {}
        self._staging = Staging()
        self._odd: list[tuple[str, TensorInfo, int]] = []
        self._reserve = _aligned(reserve)
        self._end = self._flushing = 0
        self._partial = None
        with self._errors():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._spill = tempfile.SpooledTemporaryFile(max_size=_SPILL, dir=self.path.parent)
            partial = self.path.with_name(f".{self.path.name}.{secrets.token_hex(4)}{_PARTIAL}")
            self._file = open(partial, "xb", buffering=0)
            self._partial = partial
            _lock(self._file.fileno())
            self._file.seek(_LENGTH.size + self._reserve)

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
        with self._errors():
            if info.nbytes % _ALIGNMENT:
                # Readers want every tensor aligned to its item size and no gaps: such sizes go to the end.
                self._odd.append((name, info, self._spill.tell()))
                for view in views:
                    self._spill.write(view)
            else:
                self._append(name, info, views)
        return info.nbytes

    def _append(self, name: str, info: TensorInfo, views: Iterable[memoryview]) -> None:
        self._entries[name] = _entry(info, self._end, self._end + info.nbytes)
        self._end += info.nbytes
        for view in views:
            self._write(view)
        if self._end - self._flushing >= _FLUSH and hasattr(os, "posix_fadvise"):
            # Starts writing to the disk now, beside the computation, so that the final fsync finds little left.
            begin = _LENGTH.size + self._reserve
            os.posix_fadvise(
                self._file.fileno(), begin + self._flushing, self._end - self._flushing, os.POSIX_FADV_DONTNEED
            )
            self._flushing = self._end

    def _write(self, view: memoryview) -> None:
        done = 0
        while done < len(view):
            done += self._file.write(view[done:])

    def finish(self, metadata: Mapping[str, str]) -> int:
        """Write the header, flush to disk and rename; returns the file's size in bytes."""
        with self._errors():
            for name, info, offset in sorted(self._odd, key=lambda odd: -odd[1].dtype.itemsize):
                self._spill.seek(offset)
                self._append(name, info, [memoryview(self._spill.read(info.nbytes))])
            header = _dump({"__metadata__": dict(metadata)} | self._entries)
            if len(header) > self._reserve:
                raise AssertionError(f"the header needs {len(header)} bytes and {self._reserve} were reserved")
            self._file.seek(0)
            self._write(memoryview(_LENGTH.pack(self._reserve) + header.ljust(self._reserve)))
            os.fsync(self._file.fileno())
            self._file.close()
            os.replace(self._partial, self.path)
            self._spill.close()
            if os.name == "posix":  # make the rename itself durable
                folder = os.open(self.path.parent, os.O_RDONLY)
                try:
                    os.fsync(folder)
                finally:
                    os.close(folder)
        return _LENGTH.size + self._reserve + self._end

    def abort(self) -> None:
        """Remove the partial file; does nothing after :meth:`finish`."""
        if self._partial is None:
            return
        with contextlib.suppress(OSError):
            self._file.close()
        self._spill.close()
        self._partial.unlink(missing_ok=True)

    def __enter__(self) -> "SafetensorsWriter":
        return self

    def __exit__(self, *exc) -> None:
        self.abort()
