"""Streaming writer of safetensors files with the memory of one tensor.

The header comes first in the file, but a layer that contains NaN changes it late: only the weight itself shows whether it
can be quantized. The writer therefore reserves an upper bound for the header, appends tensors, and writes the header last.

The complete file is read again and compared with the checksums that were computed when its tensors were added, on their
device: a faulty transfer, disk or memory, or another process that wrote to the file, is noticed before it has its name.
"""

import contextlib
import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, wait
from itertools import pairwise
from typing import IO, Protocol

import torch

from ..cancellation import CancelCheck, wait_for
from ..errors import ClusterLostError, OutputError
from ..sources.checksum import FileChecksums, byte_checksum, tensor_checksum
from ..sources.source import CPU, TensorInfo
from ..sources.staging import Staging, byte_views
from .durable import flush_in_background
from .layout import HEADER_LENGTH, TensorLayout, aligned_size, encode_header
from .partial import PartialFile

__all__ = ["SafetensorsWriter", "TensorJournal", "write_all"]

_WRITEBACK = 1 << 26  # bytes after which the system starts writing to the disk
_INTERPRETER_EXIT = "cannot schedule new futures"  # message of the RuntimeError of an executor


def write_all(file: IO[bytes], data: bytes | memoryview) -> None:
    """Write to an unbuffered file in as many calls as the system needs."""
    view, done = memoryview(data), 0
    while done < len(view):
        done += file.write(view[done:])


def _start_writeback(descriptor: int, begin: int, size: int) -> None:
    """Start to write a range of a file to the disk, and close the descriptor."""
    try:
        os.posix_fadvise(descriptor, begin, size, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


class TensorJournal(Protocol):
    """Record of a writer's tensors, from which another process can continue; used by the thread that writes."""

    def open(self, partial: PartialFile, data_start: int) -> TensorLayout:
        """Open a partial file, new or of a killed run, and return its layout; data begins at byte ``data_start``."""
        ...

    def record_tensor(self, name: str, info: TensorInfo, checksum: int, payload: bytes) -> None:
        """Record a tensor after it is appended; ``payload``: its bytes if it is deferred and so not yet in the file."""
        ...

    def wait_for_flush(self) -> None:
        """Wait for a flush in the background. Raises the OSError with which it failed."""
        ...


class SafetensorsWriter:
    """Write tensors in any order to a hidden partial file next to ``path``; :meth:`finish` gives it that name.

    Leaving the context without :meth:`finish` removes the partial file. One thread writes; another may :meth:`abort`.

    Args:
        path: final name; its folder is created if it is missing, a symbolic link is followed.
        reserve: bytes to reserve for the header, from :func:`header_bytes`.
        overwrite: replace an existing file; otherwise :meth:`finish` refuses, unless its content is the same.
        unfinished: file name that the hidden file names contain; by default that of ``path``.
        journal: records tensors so that another process can continue; restores those of a killed run.
        device: where the checksums of the complete file are computed.
        check: called while a thread opens or finishes the file; raise in it to cancel without waiting for the disk.
    """

    _layout: TensorLayout

    def __init__(
        self,
        path: str | os.PathLike,
        reserve: int,
        *,
        overwrite: bool = True,
        unfinished: str | None = None,
        journal: TensorJournal | None = None,
        device: torch.device = CPU,
        check: CancelCheck = lambda: None,
    ):
        self._partial = PartialFile(path, hidden_name=unfinished, overwrite=overwrite)
        self._header_size = aligned_size(reserve)
        self._data_start = HEADER_LENGTH.size + self._header_size
        self._journal, self._device, self._check = journal, device, check
        self._staging = Staging()
        self._checked = 0  # bytes of the complete file that were read again
        self._written_back = 0
        self._writeback: Future[None] | None = None
        self._finishing: Future[int] | None = None
        try:
            wait_for(self._partial.submit(self._open), check)
        except BaseException:
            self.abort()
            raise

    @property
    def matched_existing(self) -> bool:
        """Whether :meth:`finish` found a file with the same content under the final name."""
        return self._partial.matched_existing

    def _open(self) -> None:
        with self._partial.access():
            if self._journal is None:
                self._partial.create()
                self._layout = TensorLayout(self._partial.path.parent)
            else:
                self._layout = self._journal.open(self._partial, self._data_start)
            self._partial.attach(self._layout.spool)
            self._written_back = self._layout.end
            self._partial.file.seek(self._data_start + self._layout.end)

    def add(self, name: str, tensor: torch.Tensor) -> int:
        """Append one tensor; returns its size in bytes. Raises ValueError if the name was added before."""
        info = TensorInfo(tensor.dtype, tuple(tensor.shape))
        checksum = tensor_checksum(tensor)
        views, payload = byte_views(tensor, self._staging), b""
        with self._partial.access():
            if self._layout.defers(info):
                payload = b"".join(views)
            else:
                self._append(views)
            if self._journal is not None:
                self._journal.record_tensor(name, info, checksum, payload)
            self._layout.add(name, info, checksum, payload)
            if self._journal is None:  # a journal flushes the file at intervals
                self._start_writeback()
        return info.nbytes

    def _append(self, views: Iterable[bytes | memoryview]) -> None:
        for view in views:
            self._partial.check_open()
            write_all(self._partial.file, view)

    def _start_writeback(self) -> None:
        """Let the system write to the disk during the computation, so that the final flush is short.

        A thread asks for it, as the system allocates the blocks on the disk before it returns.
        """
        begin, size = self._data_start + self._written_back, self._layout.end - self._written_back
        idle = self._writeback is None or self._writeback.done()
        if size >= _WRITEBACK and idle and hasattr(os, "posix_fadvise"):
            with contextlib.ExitStack() as opened:
                descriptor = os.dup(self._partial.file.fileno())  # the file may be closed meanwhile
                opened.callback(os.close, descriptor)
                self._writeback = self._partial.submit(_start_writeback, descriptor, begin, size)
                opened.pop_all()
            self._written_back = self._layout.end

    def start_to_finish(self, metadata: Mapping[str, str]) -> None:
        """Let a thread do what :meth:`finish` waits for, while other files are finished."""
        self._finishing = self._partial.submit(self._finish, metadata)

    def finish(
        self, metadata: Mapping[str, str] | None = None, on_check: Callable[[int, int], None] = lambda done, total: None
    ) -> int:
        """Write the header, check the file, flush it to the disk and give it its name; returns its size in bytes.

        Args:
            metadata: of the header; None after :meth:`start_to_finish`.
            on_check: called with the checked bytes and all bytes while the file is read again, up to a hundred times.

        Raises:
            OutputExistsError: a file of other content has the name and must not be overwritten.
            OutputError: the disk failed: either nothing is left, or the message says that the file is complete.
        """

        shown = 0  # percent

        def check() -> None:
            nonlocal shown
            self._check()
            done, total = self._checked, self._layout.end
            if done * 100 > (shown + 1) * total:
                shown = done * 100 // total
                on_check(done, total)

        if metadata is not None:
            self.start_to_finish(metadata)
        assert self._finishing is not None, "start_to_finish was not called"
        return wait_for(self._finishing, check)

    def _finish(self, metadata: Mapping[str, str]) -> int:
        with self._partial.access():
            for payload in self._layout.place_deferred():
                self._append([payload])
            header = encode_header(metadata, self._layout.entries)
            if len(header) > self._header_size:
                raise AssertionError(f"the header has {len(header)} bytes, more than the reserved {self._header_size}")
            header = HEADER_LENGTH.pack(self._header_size) + header.ljust(self._header_size)
            self._partial.file.seek(0)
            write_all(self._partial.file, header)
            flush = flush_in_background(self._partial.submit, [self._partial.file])
            try:
                self._check_file(header)
            finally:
                wait([flush])  # it has the file open, and Windows removes no open file
            flush.result()
            if self._journal is not None:
                self._journal.wait_for_flush()  # the system reports a failed write only once, to this flush or the next
            self._partial.publish(self._data_start + self._layout.end)
        return self._data_start + self._layout.end

    def _check_file(self, header: bytes) -> None:
        """Compare the bytes in the file with the header and with the checksums of the tensors."""
        file, entries = self._partial.file, self._layout.entries
        file.seek(0)
        expected = [byte_checksum(torch.frombuffer(bytearray(header), dtype=torch.uint8))]
        expected += (self._layout.checksums[name] for name in entries)
        ends = [entry["data_offsets"][1] for entry in entries.values()]
        sizes = [len(header), *(end - begin for begin, end in pairwise([0, *ends]))]
        with FileChecksums(self._partial.check_open, self._device) as checksums:
            found = checksums.compute(file, sizes)
            for what, wanted, end in zip(
                ["its header", *(f"tensor {name}" for name in entries)], expected, [0, *ends], strict=True
            ):
                if next(found) != wanted:
                    raise self._damaged(what)
                self._checked = end

    def _damaged(self, what: str) -> OutputError:
        return OutputError(
            f"{self._partial.path} was not written: {what} was read back with other bytes; check the disk and the memory of "
            "this machine, and run again."
        )

    def abort(self) -> None:
        """Remove the partial file without waiting for a write in progress; does nothing after :meth:`finish`."""
        self._partial.abort()

    def __enter__(self) -> "SafetensorsWriter":
        return self

    def __exit__(self, kind, error: BaseException | None, trace) -> None:
        exiting = isinstance(error, RuntimeError) and _INTERPRETER_EXIT in str(error)
        resumable = exiting or isinstance(error, ClusterLostError)
        self._partial.abort(keep=resumable and self._journal is not None)  # the next process resumes the run
