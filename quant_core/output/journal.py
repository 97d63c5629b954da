"""What of a file is finished, written down so that the next run goes on from there.

A journal lies beside the partial file: after each tensor a record with its checksum, after each layer a note. Whatever a crash or a
power cut has torn or lost, in either file, does not fit its checksum: it and all that comes after it are made again.
"""

import json
import struct
import zlib
from collections.abc import Iterator
from typing import BinaryIO

__all__ = ["Journal", "checksum", "write_all"]

_HEAD = struct.Struct("<IIQ")  # bytes of the record's JSON, their checksum, bytes of the payload after it
_AT_ONCE = 1 << 24


def write_all(file: BinaryIO, view: bytes | memoryview) -> None:
    """Write in as many calls as the system wants."""
    view = memoryview(view)
    done = 0
    while done < len(view):
        done += file.write(view[done:])


def checksum(file: BinaryIO, size: int) -> int | None:
    """The CRC-32 of the next ``size`` bytes; None where the file ends before."""
    crc = 0
    while size:
        piece = file.read(min(size, _AT_ONCE))
        if not piece:
            return None
        crc = zlib.crc32(piece, crc)
        size -= len(piece)
    return crc


class Journal:
    """Records of JSON, each with a payload of bytes, appended to ``file`` and read back in order."""

    def __init__(self, file: BinaryIO):
        self.file = file

    def append(self, record: object, payload: bytes = b"") -> int:
        """Returns where in the file the payload begins."""
        text = json.dumps(record, separators=(",", ":")).encode()
        write_all(self.file, _HEAD.pack(len(text), zlib.crc32(text), len(payload)) + text)
        begin = self.file.tell()
        write_all(self.file, payload)
        return begin

    def payload(self, begin: int, size: int) -> bytes:
        """The bytes that :meth:`append` wrote there."""
        self.file.seek(begin)
        pieces = bytearray()
        while len(pieces) < size:
            piece = self.file.read(size - len(pieces))
            if not piece:
                raise OSError(f"the journal ended early at byte {begin + len(pieces)}")
            pieces += piece
        return bytes(pieces)

    def records(self) -> Iterator[tuple[object, int, int]]:
        """(record, where its payload begins, its size) from the start to the first that is torn; the payload may be read meanwhile."""
        size = self.file.seek(0, 2)
        begin = 0
        while begin + _HEAD.size <= size:
            length, crc, payload = _HEAD.unpack(self.payload(begin, _HEAD.size))
            begin += _HEAD.size
            if begin + length + payload > size:
                return
            text = self.payload(begin, length)
            if zlib.crc32(text) != crc or not text:
                return
            yield json.loads(text), begin + length, payload
            begin += length + payload

    def cut(self, end: int) -> None:
        """Forget what comes after byte ``end``; what is appended next stands there."""
        self.file.truncate(end)
        self.file.seek(end)
