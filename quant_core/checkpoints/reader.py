"""Lazy reading of safetensors files: the header at once, each tensor when it is asked for.

Tensors are read with plain reads, not mapped: mapped pages stay resident, and a file larger than RAM must go
through. Format: https://github.com/huggingface/safetensors#format
"""

import json
import os
import struct
import threading
from pathlib import Path

import torch

from ..errors import SourceError
from .dtypes import TORCH_DTYPES
from .source import CPU, TensorInfo
from .staging import Staging

__all__ = ["SafetensorsFile", "MAX_HEADER"]

MAX_HEADER = 100_000_000  # the limit of the format's own library
_LENGTH = struct.Struct("<Q")
_MAX_RANK = 64  # as many dimensions as torch's operators take
_TOO_LARGE = 2**63
_READ_AT_ONCE = 1 << 24  # how soon a closed file stops a reading thread
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


class SafetensorsFile:
    """An open safetensors file as a :class:`~.source.Source`. A context manager; reading is thread-safe.

    Raises :class:`SourceError` when the file is missing, is none, is truncated, or contradicts itself.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self.paths = (self.path,)
        self.name = self.path.name
        self._lock = threading.Lock()
        self._closing = False
        self._staging = Staging()
        try:
            if self.path.is_dir():
                raise SourceError(f"{self.path} is a folder; give a .safetensors file in it.")
            self._file = open(self.path, "rb", buffering=0)
        except FileNotFoundError:
            raise SourceError(f"There is no file {self.path}; check the path.") from None
        except OSError as error:
            raise SourceError(f"{self.path} cannot be opened: {error.strerror}.") from error
        try:
            self.size = os.fstat(self._file.fileno()).st_size
            self._parse()
        except BaseException as error:
            self._file.close()
            if isinstance(error, OSError):
                raise SourceError(f"{self.path} cannot be read: {error.strerror}; check the disk.") from error
            raise

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
        self._data = _LENGTH.size + length
        if self._data > self.size:
            raise SourceError(
                f"{self.path} is truncated: its header alone needs {self._data:,} bytes and the file has {self.size:,}; fetch it again."
            )
        self._file.seek(_LENGTH.size)
        try:
            header = json.loads(self._file.read(length), object_pairs_hook=_no_duplicates)
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
        if self._data + end > self.size:
            raise SourceError(
                f"{self.path} is truncated: it should have {self._data + end:,} bytes and has {self.size:,}; fetch it again."
            )
        if self._data + end < self.size:
            raise SourceError(
                f"{self.path} has {self.size - self._data - end:,} bytes after its last tensor; it is damaged, fetch it again."
            )
        self._offsets = {name: begin for name, begin, _, _ in spans}
        self.tensors = {name: info for name, _, _, info in spans}

    @staticmethod
    def _entry(name: str, entry: dict) -> tuple[str, int, int, TensorInfo]:
        if entry["dtype"] not in TORCH_DTYPES:
            raise ValueError(f"tensor {name} has the unknown dtype {entry['dtype']}")
        if len(entry["shape"]) > _MAX_RANK:
            raise ValueError(f"tensor {name} has {len(entry['shape']):,} dimensions")
        info = TensorInfo(TORCH_DTYPES[entry["dtype"]], tuple(entry["shape"]))
        begin, stop = entry["data_offsets"]
        if not all(type(number) is int and number >= 0 for number in (begin, stop, *info.shape)):
            raise ValueError(f"tensor {name} has no whole numbers for its shape and place")
        if max((begin, stop, *info.shape)) >= _TOO_LARGE:
            raise ValueError(f"tensor {name} has a number of more than 63 bits for its shape or place")
        if stop - begin != info.nbytes:
            raise ValueError(f"tensor {name} needs {info.nbytes:,} bytes and is given {stop - begin:,}")
        return name, begin, stop, info

    def _read_into(self, view: memoryview, offset: int, name: str) -> None:
        with self._lock:
            self._file.seek(offset)
            done = 0
            while done < len(view):
                if self._closing:
                    raise SourceError(f"{self.path} was closed while tensor {name} was read.")
                try:
                    count = self._file.readinto(view[done : done + _READ_AT_ONCE])
                except OSError as error:
                    raise SourceError(
                        f"{self.path} cannot be read at tensor {name}: {error.strerror}; check the disk."
                    ) from error
                if not count:
                    raise SourceError(
                        f"{self.path} ended early at tensor {name}: it was changed while it was read; run again."
                    )
                done += count

    def read(self, name: str, device: torch.device = CPU) -> torch.Tensor:
        info = self.tensors[name]
        begin = self._data + self._offsets[name]
        buffer = torch.empty(info.nbytes, dtype=torch.uint8, device=device)
        if buffer.is_cuda:
            self._staging.fill(buffer, lambda view, offset: self._read_into(view, begin + offset, name))
        elif info.nbytes:
            self._read_into(memoryview(buffer.numpy()), begin, name)
        return buffer.view(info.dtype).view(info.shape)

    def sample(self, name: str, offset: int, length: int) -> bytes:
        buffer = bytearray(length)
        self._read_into(memoryview(buffer), self._data + self._offsets[name] + offset, name)
        return bytes(buffer)

    def close(self) -> None:
        """Close the file; a thread that is reading stops at once with :class:`SourceError`."""
        self._closing = True
        with self._lock:
            self._file.close()

    def __enter__(self) -> "SafetensorsFile":
        return self

    def __exit__(self, *exc) -> None:
        self.close()
