"""Safetensors files. Format: https://github.com/huggingface/safetensors#format"""

import json
import struct
from pathlib import Path
from typing import Any

from ..errors import SourceError
from .dtypes import TORCH_DTYPES, UNREADABLE_DTYPES
from .kinds import HEAD, refuse_kind
from .source import TensorInfo
from .tensor_file import MAX_HEADER, MAX_RANK, SIZE_LIMIT, TensorFile

__all__ = ["SafetensorsFile", "parse_bounded_json"]

_LENGTH = struct.Struct("<Q")
_MAX_JSON_VALUES = 2_500_000  # about 100 bytes of memory each; a tensor has eight, and models have thousands of tensors


def parse_bounded_json(text: bytes, **options) -> Any:
    """Parse JSON with a bounded number of values; ``options`` are passed to ``json.loads``.

    Raises:
        ValueError: the text is not valid JSON or has too many values.
    """
    if max(map(text.count, (b",", b"[", b"{"))) > _MAX_JSON_VALUES:  # each value follows one of these
        raise ValueError(f"more than {_MAX_JSON_VALUES:,} JSON values")
    return json.loads(text, **options)


def _reject_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("a JSON key occurs twice")
    return table


def _parse_entry(path: Path, name: str, entry: dict) -> tuple[int, int, str, TensorInfo]:
    """Return (begin, end, name, info) of one header entry; begin and end are bytes of the data section."""
    if not isinstance(entry, dict):
        raise ValueError(f"the header entry of tensor {name} is not a JSON object")
    if missing := [key for key in ("dtype", "shape", "data_offsets") if key not in entry]:
        raise ValueError(f"tensor {name} has no {', '.join(missing)}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str):
        raise ValueError(f"the dtype of tensor {name} is not a string")
    if not isinstance(shape, list) or not isinstance(offsets, list) or len(offsets) != 2:
        raise ValueError(f"shape and data_offsets of tensor {name} are not a list and a list of two numbers")
    begin, end = offsets
    if dtype not in TORCH_DTYPES and dtype in UNREADABLE_DTYPES:
        raise SourceError(
            f"{path}: tensor {name} has dtype {dtype}, which ComfyUI does not load; give the model in BF16, F16 or F32.",
            file=str(path),
            tensor=name,
        )
    if dtype not in TORCH_DTYPES:
        raise ValueError(f"tensor {name} has the unknown dtype {dtype}")
    if len(shape) > MAX_RANK:
        raise ValueError(f"tensor {name} has {len(shape):,} dimensions")
    if not all(type(number) is int and 0 <= number < SIZE_LIMIT for number in (begin, end, *shape)):
        raise ValueError(f"shape and data_offsets of tensor {name} are not integers from 0 to 2^63")
    info = TensorInfo(TORCH_DTYPES[dtype], tuple(shape))
    if end - begin != info.nbytes:
        raise ValueError(f"tensor {name} needs {info.nbytes:,} bytes and has {end - begin:,}")
    return begin, end, name, info


class SafetensorsFile(TensorFile):
    """Open safetensors file as a :class:`~.source.SampledSource`. A context manager; reading is thread-safe.

    Raises:
        SourceError: the file is missing, unreadable, of another format, truncated, or inconsistent.
    """

    def _parse_header(self) -> None:
        start = self._file.read(_LENGTH.size + 1)
        if len(start) < _LENGTH.size + 1 or start[_LENGTH.size :] != b"{":
            raise refuse_kind(self.path, self._read_header(0, min(self.size, HEAD)))
        (length,) = _LENGTH.unpack(start[: _LENGTH.size])
        if length > MAX_HEADER:
            raise SourceError(
                f"{self.path} is damaged: its header of {length:,} bytes exceeds the limit of {MAX_HEADER:,}; download it again.",
                file=str(self.path),
            )
        data = _LENGTH.size + length
        self._check_size(data, "its header ends at byte")
        header = parse_bounded_json(self._read_header(_LENGTH.size, length), object_pairs_hook=_reject_duplicates)
        self.metadata = dict(header.pop("__metadata__", None) or {})
        if not all(isinstance(value, str) for value in self.metadata.values()):
            raise ValueError("__metadata__ does not map strings to strings")
        for text in (*header, *self.metadata, *self.metadata.values()):
            text.encode()  # JSON can contain an unpaired surrogate, which cannot be written as UTF-8
        end = 0
        entries = sorted(
            (_parse_entry(self.path, name, entry) for name, entry in header.items()), key=lambda entry: entry[:2]
        )
        for begin, stop, name, _ in entries:
            if begin != end:
                raise ValueError(f"tensor {name} begins at byte {begin:,} instead of {end:,}")
            end = stop
        self._check_size(data + end, "its tensors end at byte")
        if data + end < self.size:
            raise ValueError(f"{self.size - data - end:,} bytes after the last tensor")
        for begin, _, name, info in entries:
            self._add_tensor(name, info, data + begin)

    def _check_size(self, end: int, what: str) -> None:
        if end > self.size:
            raise SourceError(
                f"{self.path} is truncated: {what} {end:,} and the file has {self.size:,} bytes; download it again.",
                file=str(self.path),
            )
