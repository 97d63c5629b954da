"""Lazy reading of files of tensors: the header at once, each tensor when it is asked for.

Tensors are read with plain reads, not mapped: mapped pages stay resident, a file larger than RAM must go through, and one that is cut
short while it is mapped ends the process. Safetensors: https://github.com/huggingface/safetensors#format
"""

import json
import math
import os
import stat
import struct
import threading
import zipfile
from abc import ABC, abstractmethod
from pathlib import Path
from typing import BinaryIO

import torch

from ..errors import SourceError
from .dtypes import DTYPE_NAMES, TORCH_DTYPES
from .source import CPU, TensorInfo
from .staging import Staging

__all__ = ["SafetensorsFile", "StoredTensors", "bounded_json", "open_regular", "MAX_HEADER", "MAX_RANK", "TOO_LARGE"]

MAX_HEADER = 100_000_000  # the limit of the format's own library
_LENGTH = struct.Struct("<Q")
_MOST_VALUES = 2_500_000  # of a header, each of which takes a hundred bytes of memory; a tensor has eight, and models have thousands
MAX_RANK = 64  # as many dimensions as torch's operators take
TOO_LARGE = 2**63
_READ_AT_ONCE = 1 << 24  # how soon a closed file stops a reading thread
_DAMAGES = (
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    ArithmeticError,
    EOFError,
    RecursionError,
    MemoryError,
    NotImplementedError,
)
_DAMAGES += (struct.error, zipfile.BadZipFile)  # what a damaged file does to its reader
_OTHER_KINDS = (
    (b"PK\x03\x04", "a pickled PyTorch checkpoint"),
    (b"GGUF", "a GGUF file"),
    (b"\x80\x02", "a pickled PyTorch checkpoint"),
)


def _no_duplicates(pairs):
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("a name stands in it twice")
    return table


def bounded_json(text: bytes, **options) -> object:
    """What a file's JSON says, in memory in proportion to what models have. Raises ValueError; ``options``: of ``json.loads``."""
    if max(map(text.count, (b",", b"[", b"{"))) > _MOST_VALUES:  # before or after each value stands one of these
        raise ValueError(f"more than {_MOST_VALUES:,} values")
    return json.loads(text, **options)


def open_regular(path: Path) -> BinaryIO:
    """An ordinary file for reading, without a buffer; waits for nobody at the other end of a pipe. Raises :class:`SourceError`."""
    try:
        file = open(
            path, "rb", buffering=0, opener=lambda name, flags: os.open(name, flags | getattr(os, "O_NONBLOCK", 0))
        )
    except FileNotFoundError:
        raise SourceError(f"There is no file {path}; check the path.") from None
    except (OSError, ValueError) as error:  # ValueError: a name that no system takes
        raise SourceError(f"{path} cannot be opened: {getattr(error, 'strerror', None) or error}.") from error
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise SourceError(f"{path} is no ordinary file; give a file, not a device or a pipe.")
    return file


class StoredTensors(ABC):
    """Tensors that lie as plain values in an open file, as a :class:`~.source.SampledSource`. A context manager; reading is thread-safe.

    What kind of file it is, is a subclass: its ``_parse`` tells where each tensor lies.

    Raises :class:`SourceError` when the file is missing, is of another kind, is truncated, or contradicts itself.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self.paths = (self.path,)
        self.name = self.path.name
        self.metadata: dict[str, str] = {}
        self.tensors: dict[str, TensorInfo] = {}
        self._begins: dict[str, int] = {}
        self._lock = threading.Lock()
        self._closing = False
        self._staging = Staging()
        if os.path.isdir(self.path):
            raise SourceError(f"{self.path} is a folder; give a file in it.")
        self._file = open_regular(self.path)
        try:
            self.size = os.fstat(self._file.fileno()).st_size
            self._parse()
        except BaseException as error:
            self._file.close()
            if isinstance(error, OSError):
                raise SourceError(f"{self.path} cannot be read: {error.strerror or error}; check the disk.") from error
            if isinstance(error, _DAMAGES):
                raise SourceError(f"{self.path} is damaged ({error}); fetch it again.") from None
            raise

    @abstractmethod
    def _parse(self) -> None:
        """Place all tensors; anything that a damaged file may cause can be raised."""

    def _place(self, name: str, info: TensorInfo, begin: int, span: int | None = None) -> None:
        """A tensor whose values lie from byte ``begin`` of the file on, in ``span`` bytes if not in its own number."""
        name.encode()  # half a character, which no output can hold
        if name in self.tensors or name == "__metadata__":
            raise ValueError(f"the name {name} stands in it twice or is no tensor's")
        if info.dtype not in DTYPE_NAMES:
            raise ValueError(f"tensor {name} is of {info.dtype}, which safetensors does not have")
        if not all(type(side) is int and side >= 0 for side in info.shape):
            raise ValueError(f"tensor {name} has no whole numbers for its shape")
        if (
            math.prod(max(side, 1) for side in info.shape) * info.dtype.itemsize >= TOO_LARGE
        ):  # of an empty one too: torch multiplies them
            raise ValueError(f"tensor {name} has a shape of more than 63 bits")
        if type(begin) is not int or not 0 <= begin <= self.size - (info.nbytes if span is None else span):
            raise ValueError(f"tensor {name} lies beyond its end")
        self.tensors[name], self._begins[name] = info, begin

    def _read_into(self, view: memoryview, offset: int, what: str) -> None:
        """Fill ``view`` with the file's bytes from ``offset`` on; ``what``: for messages."""
        try:
            with self._lock:
                done = 0
                while done < len(view):
                    if self._closing:
                        raise SourceError(f"{self.path} was closed while {what} was read.")
                    try:
                        self._file.seek(offset + done)
                        count = self._file.readinto(view[done : done + _READ_AT_ONCE])
                    except OSError as error:
                        raise SourceError(
                            f"{self.path} cannot be read at {what}: {error.strerror}; check the disk."
                        ) from error
                    if not count:
                        raise SourceError(
                            f"{self.path} ended early at {what}: it was changed while it was read; run again."
                        )
                    done += count
        finally:
            if self._closing:
                self.close()

    def _bytes(self, begin: int, length: int, what: str = "its header") -> bytes:
        """Of the file, as they lie there."""
        if not 0 <= begin <= begin + length <= self.size:
            raise ValueError(f"{what} lies beyond its end")
        buffer = bytearray(length)
        self._read_into(memoryview(buffer), begin, what)
        return bytes(buffer)

    def _values(self, name: str, offset: int, length: int, device: torch.device) -> torch.Tensor:
        """``length`` bytes of a tensor's from ``offset`` on, on ``device``."""
        begin = self._begins[name] + offset
        buffer = torch.empty(length, dtype=torch.uint8, device=device)
        if buffer.is_cuda:
            self._staging.fill(buffer, lambda view, done: self._read_into(view, begin + done, f"tensor {name}"))
        elif length:
            self._read_into(memoryview(buffer.numpy()), begin, f"tensor {name}")
        return buffer

    def read(self, name: str, device: torch.device = CPU) -> torch.Tensor:
        """The tensor on ``device``."""
        info = self.tensors[name]
        return self._values(name, 0, info.nbytes, device).view(info.dtype).view(info.shape)

    def sample(self, name: str, offset: int, length: int) -> bytes:
        """``length`` bytes of the tensor's memory from byte ``offset``."""
        return self._values(name, offset, length, CPU).numpy().tobytes()

    def close(self) -> None:
        """Close the file without waiting for a thread that is reading, which stops with :class:`SourceError` as soon as it can."""
        self._closing = True
        if self._lock.acquire(blocking=False):
            try:
                self._file.close()
            finally:
                self._lock.release()

    def __enter__(self):
        return self

    def __exit__(self, *exc) -> None:
        self.close()


class SafetensorsFile(StoredTensors):
    """An open safetensors file as a :class:`~.source.SampledSource`. A context manager; reading is thread-safe.

    Raises :class:`SourceError` when the file is missing, is none, is truncated, or contradicts itself.
    """

    def _parse(self) -> None:
        start = self._file.read(_LENGTH.size + 1)
        kind = next((kind for magic, kind in _OTHER_KINDS if start.startswith(magic)), "another kind of file")
        if len(start) < _LENGTH.size + 1 or start[_LENGTH.size :] != b"{":
            raise SourceError(
                f"{self.path} is not a safetensors file but {kind if self.size else 'empty'}; give a .safetensors file."
            )
        (length,) = _LENGTH.unpack(start[: _LENGTH.size])
        if length > MAX_HEADER:
            raise SourceError(
                f"{self.path} claims a header of {length:,} bytes, more than the {MAX_HEADER:,} the format allows; the file is damaged."
            )
        start_of_data = _LENGTH.size + length
        if start_of_data > self.size:
            raise SourceError(
                f"{self.path} is truncated: its header alone needs {start_of_data:,} bytes and the file has {self.size:,}; fetch it again."
            )
        text = self._bytes(_LENGTH.size, length)
        try:
            header = bounded_json(text, object_pairs_hook=_no_duplicates)
            self.metadata = dict(header.pop("__metadata__", None) or {})
            if not all(isinstance(value, str) for value in self.metadata.values()):
                raise ValueError("its metadata is no table of strings")
            for text in (*header, *self.metadata, *self.metadata.values()):
                text.encode()  # JSON can escape half a character, which no output can hold
            spans = sorted(
                (self._entry(name, entry) for name, entry in header.items()), key=lambda span: (span[1], span[2])
            )
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise SourceError(f"{self.path} has a damaged header ({error}); fetch the file again.") from None
        end = 0
        for name, begin, stop, _ in spans:
            if begin != end:
                raise SourceError(
                    f"{self.path} has a damaged header (tensor {name} begins at byte {begin:,} instead of {end:,}); fetch the file again."
                )
            end = stop
        if start_of_data + end > self.size:
            raise SourceError(
                f"{self.path} is truncated: it should have {start_of_data + end:,} bytes and has {self.size:,}; fetch it again."
            )
        if start_of_data + end < self.size:
            raise SourceError(
                f"{self.path} has {self.size - start_of_data - end:,} bytes after its last tensor; it is damaged, fetch it again."
            )
        for name, begin, _, info in spans:
            self._place(name, info, start_of_data + begin)

    @staticmethod
    def _entry(name: str, entry: dict) -> tuple[str, int, int, TensorInfo]:
        if entry["dtype"] not in TORCH_DTYPES:
            raise ValueError(f"tensor {name} has the unknown dtype {entry['dtype']}")
        if len(entry["shape"]) > MAX_RANK:
            raise ValueError(f"tensor {name} has {len(entry['shape']):,} dimensions")
        info = TensorInfo(TORCH_DTYPES[entry["dtype"]], tuple(entry["shape"]))
        begin, stop = entry["data_offsets"]
        if not all(type(number) is int and number >= 0 for number in (begin, stop, *info.shape)):
            raise ValueError(f"tensor {name} has no whole numbers for its shape and place")
        if max((begin, stop, *info.shape)) >= TOO_LARGE:
            raise ValueError(f"tensor {name} has a number of more than 63 bits for its shape or place")
        if stop - begin != info.nbytes:
            raise ValueError(f"tensor {name} needs {info.nbytes:,} bytes and is given {stop - begin:,}")
        return name, begin, stop, info
