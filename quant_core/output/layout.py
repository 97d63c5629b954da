"""Layout of a safetensors file: header length (uint64, little endian), header (JSON, padded with spaces), data.

Every tensor begins at a multiple of 8 bytes and no gaps are allowed, so tensors whose size is not a multiple of 8 follow
all others, sorted by falling item size.
"""

import errno
import json
import struct
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, TypedDict

import torch

from ..sources.dtypes import DTYPE_NAMES, TORCH_DTYPES
from ..sources.source import TensorInfo

__all__ = ["HEADER_LENGTH", "TensorLayout", "aligned_size", "encode_header", "header_bytes"]

HEADER_LENGTH = struct.Struct("<Q")
_ALIGNMENT = 8
_MAX_OFFSET = 10**15
_SPILL = 1 << 24  # bytes of deferred tensors that are held in memory


class HeaderEntry(TypedDict):
    """Entry of a tensor in the header; ``data_offsets``: first byte in the data section, and the byte after the last."""

    dtype: str
    shape: list[int]
    data_offsets: list[int]


def aligned_size(size: int) -> int:
    """``size`` rounded up to a multiple of the alignment."""
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def encode_header(metadata: Mapping[str, str], entries: Mapping[str, HeaderEntry]) -> bytes:
    """JSON of a header; ``entries``: tensor name → dtype, shape and offsets."""
    header = {"__metadata__": dict(metadata), **entries}
    return json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()


def header_bytes(tensors: Iterable[tuple[str, TensorInfo]], metadata: Mapping[str, str]) -> int:
    """Upper bound of the header size in bytes for these tensors at any offsets."""
    entries = {name: _entry(info, _MAX_OFFSET, _MAX_OFFSET) for name, info in tensors}
    return aligned_size(len(encode_header(metadata, entries)))


def _entry(info: TensorInfo, begin: int, end: int) -> HeaderEntry:
    return {"dtype": DTYPE_NAMES[info.dtype], "shape": list(info.shape), "data_offsets": [begin, end]}


class TensorLayout:
    """Positions of the tensors in the data section.

    Args:
        folder: folder of the output, for the spool.

    Attributes:
        entries: name → header entry of the tensors with a position, in the order of the file.
        checksums: name → checksum of the bytes of a tensor.
        end: size of the data section in bytes.
        spool: bytes of the deferred tensors until they have a position.
    """

    def __init__(self, folder: Path):
        self.entries: dict[str, HeaderEntry] = {}
        self.checksums: dict[str, int] = {}
        self.end = 0
        self._deferred: list[tuple[str, TensorInfo, int]] = []
        self.spool = tempfile.SpooledTemporaryFile(max_size=_SPILL, dir=str(folder))

    @staticmethod
    def defers(info: TensorInfo) -> bool:
        """Whether a tensor follows all others because its size is not a multiple of 8 bytes."""
        return info.nbytes % _ALIGNMENT != 0

    def add(self, name: str, info: TensorInfo, checksum: int, payload: bytes = b"") -> None:
        """Place the next tensor; ``payload``: its bytes if it is deferred. Raises ValueError for a duplicate name."""
        if name in self.checksums:
            raise ValueError(f"tensor {name} is written twice")
        self.checksums[name] = checksum
        if self.defers(info):
            self._deferred.append((name, info, self.spool.tell()))
            self.spool.write(payload)
        else:
            self._append(name, info)

    def read(self, name: str, file: IO[bytes], data_start: int) -> torch.Tensor:
        """A tensor that was added, from the spool or from ``file``; the positions of both stay as they are."""
        entry = self.entries.get(name)
        if entry is not None:
            info = TensorInfo(TORCH_DTYPES[entry["dtype"]], tuple(entry["shape"]))
            begin = data_start + entry["data_offsets"][0]
        else:
            info, begin = next((info, begin) for deferred, info, begin in self._deferred if deferred == name)
            file = self.spool
        position = file.tell()
        file.seek(begin)
        data = bytearray()
        while len(data) < info.nbytes and (chunk := file.read(info.nbytes - len(data))):
            data += chunk
        file.seek(position)
        if len(data) < info.nbytes:
            raise OSError(errno.EIO, f"tensor {name} ends early")
        if not data:
            return torch.empty(info.shape, dtype=info.dtype)
        return torch.frombuffer(data, dtype=torch.uint8).view(info.dtype).reshape(info.shape)

    def place_deferred(self) -> Iterator[bytes]:
        """Give the deferred tensors their positions and yield their bytes in this order."""
        for name, info, begin in sorted(self._deferred, key=lambda deferred: -deferred[1].dtype.itemsize):
            self.spool.seek(begin)
            yield self.spool.read(info.nbytes)
            self._append(name, info)

    def _append(self, name: str, info: TensorInfo) -> None:
        self.entries[name] = _entry(info, self.end, self.end + info.nbytes)
        self.end += info.nbytes
