"""Base class of the file readers: parse the header on opening, read each tensor at its position on request.

Files are read, not memory-mapped: mapped pages stay resident, which matters for files larger than RAM, and truncating a mapped file
ends the process with SIGBUS.
"""

import contextlib
import io
import math
import os
import pickle
import stat
import struct
import threading
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from ..display import describe_cause
from ..errors import SourceError
from ..file_system import long_path
from .dtypes import DTYPE_NAMES
from .positional import positional_reader
from .recycled import RecycledMemory
from .source import CPU, TensorInfo
from .staging import Staging

__all__ = ["MAX_HEADER", "MAX_NAME", "MAX_RANK", "SIZE_LIMIT", "WHOLE", "Part", "TensorFile", "open_regular_file"]

MAX_HEADER = 100_000_000  # bytes; the limit of the safetensors library
MAX_NAME = 1000  # characters of the name of a layer, and of the part after it; those of models have up to two hundred
MAX_RANK = 64  # dimensions; the limit of torch operators
SIZE_LIMIT = 2**63  # torch stores sizes and offsets as int64
_CHUNK = 1 << 24  # bytes per read; bounds the delay until close() stops a reading thread
_TENSORS_OF_ONE_DEVICE = 4  # that a run holds at most: being read, quantized and written
_PARSE_ERRORS = (
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    ArithmeticError,
    EOFError,
    RecursionError,
    MemoryError,
    NotImplementedError,
    struct.error,
    pickle.UnpicklingError,
    zipfile.BadZipFile,
)  # raised by a header parser on a damaged file


def open_regular_file(path: Path) -> io.FileIO:
    """Open a regular file for unbuffered reading, without blocking on a named pipe.

    Raises:
        SourceError: the file does not exist, cannot be opened, or is a device or a pipe.
    """
    try:
        file = open(
            long_path(path),
            "rb",
            buffering=0,
            opener=lambda name, flags: os.open(name, flags | getattr(os, "O_NONBLOCK", 0)),
        )
    except FileNotFoundError:
        raise SourceError(f"There is no file {path}; check the path.", file=str(path)) from None
    except (OSError, ValueError) as error:  # ValueError: null character in the path
        raise SourceError(
            f"{path} cannot be opened: {getattr(error, 'strerror', None) or error}.", file=str(path)
        ) from error
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise SourceError(f"{path} is not a regular file; give a file, not a device or a pipe.", file=str(path))
    return file


class TensorFile(ABC):
    """Open file of tensors as a :class:`~.source.SampledSource`. A context manager; reading is thread-safe.

    Subclasses implement ``_parse_header`` for one file format.

    Attributes:
        path: the file.
        paths: all files that are read: this one.
        size: bytes of the file.

    Raises:
        SourceError: the file is missing, unreadable, of another format, truncated, or inconsistent.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self.paths = (self.path,)
        self.name = self.path.name
        self.metadata: dict[str, str] = {}
        self.tensors: dict[str, TensorInfo] = {}
        self._offsets: dict[str, int] = {}
        self._lock = threading.Lock()
        self._readers = 0  # threads in _read_into
        self._closing = False
        self._staging, self._memory = Staging(), RecycledMemory(_TENSORS_OF_ONE_DEVICE)
        if os.path.isdir(self.path):
            raise SourceError(f"{self.path} is a folder; give a file in it.", file=str(self.path))
        self._file = open_regular_file(self.path)
        self._read_at = positional_reader(self._file)
        try:
            self.size = os.fstat(self._file.fileno()).st_size
            self._parse_header()
        except BaseException as error:
            self._file.close()
            if isinstance(error, OSError):
                raise SourceError(
                    f"{self.path} cannot be read: {error.strerror or error}; check the disk.", file=str(self.path)
                ) from error
            if isinstance(error, _PARSE_ERRORS):
                error.with_traceback(None)  # its frames hold all that was parsed, which can be hundreds of megabytes
                raise SourceError(
                    f"{self.path} is damaged ({describe_cause(error)}); download it again.", file=str(self.path)
                ) from None
            raise

    @abstractmethod
    def _parse_header(self) -> None:
        """Add all tensors. Any of ``_PARSE_ERRORS`` is reported as a damaged file."""

    def _add_tensor(self, name: str, info: TensorInfo, offset: int, span: int | None = None) -> None:
        """Register a tensor stored at byte ``offset`` of the file, in ``span`` bytes (default: ``info.nbytes``)."""
        name.encode()  # JSON and pickles can contain an unpaired surrogate, which cannot be written as UTF-8
        if max(map(len, name.rpartition("."))) > MAX_NAME:
            raise ValueError(f"a tensor name has {len(name):,} characters, more than the {MAX_NAME:,} of a layer")
        if name in self.tensors or name == "__metadata__":
            raise ValueError(f"tensor name {name} is reserved or occurs twice")
        if info.dtype not in DTYPE_NAMES:
            raise ValueError(f"tensor {name} has dtype {info.dtype}, which safetensors does not support")
        if not all(type(side) is int and side >= 0 for side in info.shape):
            raise ValueError(f"the shape of tensor {name} is not a list of non-negative integers")
        # torch multiplies the sides of an empty tensor too
        if math.prod(max(side, 1) for side in info.shape) * info.dtype.itemsize >= SIZE_LIMIT:
            raise ValueError(f"the size of tensor {name} exceeds 63 bits")
        if type(offset) is not int or not 0 <= offset <= self.size - (info.nbytes if span is None else span):
            raise ValueError(f"tensor {name} extends beyond the end of the file")
        self.tensors[name], self._offsets[name] = info, offset

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        """Keep the file open for one thread."""
        with self._lock:
            self._readers += 1
        try:
            yield
        finally:
            with self._lock:
                self._readers -= 1
                if self._closing and not self._readers:
                    self._file.close()

    def _read_into(self, view: memoryview, offset: int, what: str) -> None:
        """Fill ``view`` with the bytes of the file from ``offset``; error messages name ``what``."""
        done = 0
        with self._reading():
            while done < len(view):
                if self._closing:
                    raise SourceError(f"{self.path} was closed while {what} was read.", file=str(self.path))
                try:
                    count = self._read_at(view[done : done + _CHUNK], offset + done)
                except OSError as error:
                    raise SourceError(
                        f"{self.path} cannot be read at {what}: {error.strerror}; check the disk.",
                        file=str(self.path),
                    ) from error
                if not count:
                    raise SourceError(
                        f"{self.path} ended early at {what}: it was changed while it was read; run again.",
                        file=str(self.path),
                    )
                done += count

    def _read_header(self, offset: int, length: int) -> bytes:
        """Return ``length`` bytes of the file from ``offset``."""
        if not 0 <= offset <= offset + length <= self.size:
            raise ValueError("the header extends beyond the end of the file")
        buffer = bytearray(length)
        self._read_into(memoryview(buffer), offset, "its header")
        return bytes(buffer)

    def _read_bytes(self, name: str, offset: int, length: int, device: torch.device) -> torch.Tensor:
        """Return ``length`` stored bytes of a tensor from ``offset``, as uint8 on ``device``."""
        begin = self._offsets[name] + offset
        on_cpu = torch.device(device).type == "cpu"
        buffer = self._memory.empty(length) if on_cpu else torch.empty(length, dtype=torch.uint8, device=device)
        if buffer.is_cuda:
            self._staging.fill(buffer, lambda view, done: self._read_into(view, begin + done, f"tensor {name}"))
        elif length:
            self._read_into(buffer.numpy().data, begin, f"tensor {name}")
        return buffer

    def read(self, name: str, device: torch.device = CPU) -> torch.Tensor:
        """Load one tensor onto ``device``."""
        info = self.tensors[name]
        return self._read_bytes(name, 0, info.nbytes, device).view(info.dtype).view(info.shape)

    def sample(self, name: str, offset: int, length: int) -> bytes:
        """Return ``length`` bytes of a tensor, starting at byte ``offset`` of its contiguous memory."""
        return self._read_bytes(name, offset, length, CPU).numpy().tobytes()

    def close(self) -> None:
        """Close the file without blocking; a thread that is reading stops with :class:`SourceError`."""
        with self._lock:
            self._closing = True
            if not self._readers:
                self._file.close()

    def __enter__(self):
        return self

    def __exit__(self, *exc) -> None:
        self.close()


class Part(NamedTuple):
    """Place of a file in a model: its number from 0, the number of files, and the first file, None for that one itself."""

    number: int
    count: int
    first: TensorFile | None


WHOLE = Part(0, 1, None)
