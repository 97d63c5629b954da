"""Resume: what a killed run finished is read from its journal, and the next run with the same key continues its file.

The journal is next to the partial file. It has one record per tensor, with the checksum of its bytes, and one record per
finished layer, with the checksums of the source tensors that it was made from. Bytes that a crash or a power failure tore or
lost, in either file, do not match their checksum, nor do weights that were changed since: they and everything after them are
made again.
"""

import contextlib
import io
import json
import os
import struct
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch

from ..events import LayerFinished, LayerKept
from ..output.durable import flush_in_background
from ..output.layout import TensorLayout
from ..output.partial import JOURNAL_SUFFIX, PartialFile, check_leftover, claim_partial, open_leftover
from ..output.publish import flush_folder
from ..output.writer import write_all
from ..sources import TensorInfo
from ..sources.checksum import FileChecksums
from ..sources.dtypes import DTYPE_NAMES, TORCH_DTYPES
from .recorded import RecordedSource

__all__ = ["FinishedLayer", "JournalFile", "LayerEvent", "RunJournal"]

LayerEvent = LayerFinished | LayerKept
_EVENTS: dict[str, type[LayerFinished] | type[LayerKept]] = {kind.__name__: kind for kind in (LayerFinished, LayerKept)}
_RECORD = struct.Struct("<IIQ")  # size of the record's JSON, CRC-32 of it, size of the payload that follows
_CHUNK = 1 << 24  # bytes read at a time
_FLUSH_INTERVAL = 1 << 28  # bytes of tensors between two flushes: about what a power failure costs
_MALFORMED = (KeyError, IndexError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError)


@dataclass(frozen=True)
class FinishedLayer:
    """A layer, or an unquantized tensor, that a killed run finished.

    Attributes:
        events: events that the killed run emitted for its tensors; the first one is of its weight.
        config: JSON configuration of the quantized layer, None for unquantized tensors.
    """

    events: Sequence[LayerEvent]
    config: dict[str, object] | None


class RunJournal:
    """Journal of one run; restores the layers of a killed run with the same key.

    It is the :class:`~..output.writer.TensorJournal` of the run's writer. The loop adds :meth:`record_layer`.

    Args:
        key: equal for runs that write the same bytes.
        source: source of the run. The tensors that a finished layer was made from are read again and compared.
        device_of: device that the run reads a tensor to.

    Attributes:
        layers: layers that are restored; their tensors must not be added again.
    """

    _partial: PartialFile
    _file: "JournalFile"
    _layout: TensorLayout
    _data_start: int

    def __init__(self, key: str, source: RecordedSource, device_of: Callable[[str], torch.device]):
        self.layers: Sequence[FinishedLayer] = ()
        self._key, self._source, self._device_of = key, source, device_of
        self._unflushed = 0
        self._flush: Future[None] | None = None

    def open(self, partial: PartialFile, data_start: int) -> TensorLayout:
        """Continue the partial file of a killed run, or create a new one with a new journal."""
        self._partial, self._data_start = partial, data_start
        for candidate in partial.leftovers():
            layout = self._resume(candidate, data_start)
            if layout is not None:
                return layout
        partial.create()
        self._file = JournalFile(open(partial.journal_path, "x+b", buffering=0))
        partial.attach(self._file.file)
        self._file.append(self._header(data_start))
        self._layout = TensorLayout(partial.path.parent)
        return self._layout

    def read_layer(self, layer: str) -> dict[str, torch.Tensor]:
        """The tensors of a restored layer by the last part of their names, on the CPU; ``layer``: its base name."""
        with self._partial.access():
            names = [name for name in self._layout.checksums if name.rpartition(".")[0] == layer]
            return {
                name.rpartition(".")[2]: self._layout.read(name, self._partial.file, self._data_start) for name in names
            }

    def record_tensor(self, name: str, info: TensorInfo, checksum: int, payload: bytes) -> None:
        """Record an appended tensor; ``payload``: its bytes if they are not yet in the file."""
        record = {"name": name, "dtype": DTYPE_NAMES[info.dtype], "shape": info.shape, "checksum": checksum}
        self._file.append(record, payload)
        self._unflushed += info.nbytes

    def record_layer(self, events: Sequence[LayerEvent], config: Mapping[str, object] | None) -> None:
        """Record that the tensors since the last call are a finished layer; ``events``: one for each of its source tensors."""
        layer = {
            "events": [[type(event).__name__, vars(event)] for event in events],
            "config": config,
            "source_checksums": self._source_checksums(events),
        }
        with self._partial.access():
            self._file.append({"layer": layer})
            if self._unflushed >= _FLUSH_INTERVAL:
                self._start_flush()

    def wait_for_flush(self) -> None:
        """Wait for the flush in the background. Raises the OSError with which it failed."""
        if self._flush is not None:
            self._flush.result()

    def _header(self, data_start: int) -> dict[str, object]:
        return {"run": self._key, "data_start": data_start}

    def _source_checksums(self, events: Sequence[LayerEvent]) -> dict[str, int]:
        return {event.name: self._source.checksum(event.name, self._device_of(event.name)) for event in events}

    def _resume(self, hidden: Path, data_start: int) -> TensorLayout | None:
        """Continue one partial file; None if its run lives, had another key or finished no layer, or a file is unreadable."""
        with contextlib.ExitStack() as opened:
            try:
                file = opened.enter_context(open_leftover(hidden))
                journal_path = hidden.with_suffix(JOURNAL_SUFFIX)
                journal = JournalFile(opened.enter_context(open_leftover(journal_path)))
                if not claim_partial(file):
                    return None
                check_leftover(file, hidden)  # it may have been removed or published before it was locked
                layout, layers, end = self._read_layers(file, journal, data_start)
                if not layers:
                    return None
                file.truncate(data_start + layout.end)
                journal.truncate(end)
            except OSError:
                return None
            opened.pop_all()
        self._partial.adopt(hidden, file)
        self._partial.attach(journal.file)
        self._file, self.layers, self._layout = journal, layers, layout
        return layout

    def _read_layers(
        self, file: io.FileIO, journal: "JournalFile", data_start: int
    ) -> tuple[TensorLayout, list[FinishedLayer], int]:
        """Layout and layers that are intact in both files, and the end of their records in the journal."""
        layout, layers, end = TensorLayout(self._partial.path.parent), [], 0
        tensors: list[tuple[str, TensorInfo, int, bytes]] = []  # of the layer whose record follows
        names: set[str] = set()
        records = journal.records()
        file.seek(data_start)
        with contextlib.suppress(*_MALFORMED), FileChecksums(self._partial.check_open) as checksums:
            if next(records, (None,))[0] != self._header(data_start):
                return layout, layers, end
            for record, begin, size in records:
                self._partial.check_open()
                if "layer" not in record:
                    tensors.append(_read_tensor(record, file, journal, begin, size, checksums))
                    if tensors[-1][0] in names:
                        raise ValueError(f"tensor {tensors[-1][0]} is recorded twice")
                    names.add(tensors[-1][0])
                    continue
                layer = self._parse_layer(record["layer"])
                for tensor in tensors:
                    layout.add(*tensor)
                layers.append(layer)
                end, tensors = begin + size, []
        return layout, layers, end

    def _parse_layer(self, record: dict[str, Any]) -> FinishedLayer:
        """The layer of a record. Raises an error of ``_MALFORMED`` if it is not a layer of this source."""
        events = [_parse_event(kind, fields) for kind, fields in record["events"]]
        config = record["config"]
        if not isinstance(config or {}, dict):
            raise ValueError("the configuration is not an object")
        if any(self._source.tensors[event.name].shape != event.shape for event in events):
            raise ValueError("the layer is of another source")
        if record["source_checksums"] != self._source_checksums(events):
            raise ValueError("the weights have changed")
        return FinishedLayer(events=events, config=config)

    def _start_flush(self) -> None:
        """Flush both files in the background, unless the previous flush still runs."""
        if self._flush is None:
            flush_folder(self._partial.path.parent)
        elif not self._flush.done():
            return
        else:
            self._flush.result()
        self._flush = flush_in_background(self._partial.submit, (self._partial.file, self._file.file))
        self._unflushed = 0


def _parse_event(kind: str, fields: dict[str, Any]) -> LayerEvent:
    """The event with these fields, in which JSON has turned tuples into lists."""
    values: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()
    }
    return _EVENTS[kind](**values)


def _read_tensor(
    record: dict[str, Any], file: io.FileIO, journal: "JournalFile", begin: int, size: int, checksums: FileChecksums
) -> tuple[str, TensorInfo, int, bytes]:
    """The next tensor of a partial file with its checksum, and its bytes if they are the payload of its record, ``size``
    bytes at ``begin``.

    Raises ValueError if they are damaged.
    """
    info = TensorInfo(TORCH_DTYPES[record["dtype"]], tuple(record["shape"]))
    record["name"].encode()  # raises UnicodeEncodeError for a lone surrogate, which no file can contain
    payload = journal.payload(begin, size)
    deferred = TensorLayout.defers(info)
    if len(payload) != (info.nbytes if deferred else 0):
        raise ValueError(f"the record of tensor {record['name']} has {len(payload):,} bytes")
    found = checksums.next(io.BytesIO(payload) if deferred else file, info.nbytes)
    if found is None or found != record["checksum"]:
        raise ValueError(f"the bytes of tensor {record['name']} are damaged")
    return record["name"], info, found, payload


class JournalFile:
    """Records of JSON with a binary payload, appended to a file and read back in order."""

    def __init__(self, file: IO[bytes]):
        self.file = file

    def append(self, record: object, payload: bytes = b"") -> int:
        """Append a record; returns the offset of its payload."""
        text = json.dumps(record, separators=(",", ":")).encode()
        write_all(self.file, _RECORD.pack(len(text), zlib.crc32(text), len(payload)) + text)
        begin = self.file.tell()
        write_all(self.file, payload)
        return begin

    def payload(self, begin: int, size: int) -> bytes:
        """The ``size`` bytes at offset ``begin``."""
        self.file.seek(begin)
        chunks = bytearray()
        while len(chunks) < size:
            chunk = self.file.read(min(size - len(chunks), _CHUNK))
            if not chunk:
                raise OSError(f"the journal ended early at byte {begin + len(chunks)}")
            chunks += chunk
        return bytes(chunks)

    def records(self) -> Iterator[tuple[Any, int, int]]:
        """(record, offset of its payload, size of its payload) of each record before the first torn one."""
        size = self.file.seek(0, os.SEEK_END)
        begin = 0
        while begin + _RECORD.size <= size:
            length, crc, payload = _RECORD.unpack(self.payload(begin, _RECORD.size))
            begin += _RECORD.size
            if begin + length + payload > size:
                return
            text = self.payload(begin, length)
            if zlib.crc32(text) != crc or not text:
                return
            yield json.loads(text), begin + length, payload
            begin += length + payload

    def truncate(self, end: int) -> None:
        """Discard everything from offset ``end``, where the next record is appended."""
        self.file.truncate(end)
        self.file.seek(end)
