"""GGUF files: parsed here, dequantized by the package ``gguf``. Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md

``gguf.GGUFReader`` is not used: it memory-maps the file, and a hostile header of 3 MB takes it more than a minute.
"""

import io
import math
import os
import struct
from collections import Counter
from typing import Any, NamedTuple

import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType, dequantize
from gguf.constants import GGUF_DEFAULT_ALIGNMENT

from ..errors import SourceError
from ..formats.layer_json import QUANTIZATION_KEY
from .gguf_shapes import restore_shape
from .source import CPU, TensorInfo
from .tensor_file import MAX_HEADER, MAX_RANK, WHOLE, Part, TensorFile

__all__ = ["GGUFFile"]

_VERSIONS = (2, 3)
_MAX_ENTRIES = 1 << 16  # tensors, and key-value pairs; bounds the memory for a header
_PLAIN_DTYPES = {
    GGMLQuantizationType.F64: torch.float64,
    GGMLQuantizationType.F32: torch.float32,
    GGMLQuantizationType.F16: torch.float16,
    GGMLQuantizationType.BF16: torch.bfloat16,
    GGMLQuantizationType.I8: torch.int8,
    GGMLQuantizationType.I16: torch.int16,
    GGMLQuantizationType.I32: torch.int32,
    GGMLQuantizationType.I64: torch.int64,
}
_KNOWN_TYPES = set(GGMLQuantizationType)
_DEQUANTIZED = torch.bfloat16  # covers the range of every scale; its rounding error is a tenth of that of Q8_0
_SCALARS = {  # format characters of struct
    GGUFValueType.UINT8: "B",
    GGUFValueType.INT8: "b",
    GGUFValueType.UINT16: "H",
    GGUFValueType.INT16: "h",
    GGUFValueType.UINT32: "I",
    GGUFValueType.INT32: "i",
    GGUFValueType.UINT64: "Q",
    GGUFValueType.INT64: "q",
    GGUFValueType.FLOAT32: "f",
    GGUFValueType.FLOAT64: "d",
    GGUFValueType.BOOL: "?",
}
_ORIGINAL_SHAPE = (
    "comfy.gguf.orig_shape."  # + tensor name: its shape before it was reshaped into whole blocks (ComfyUI-GGUF)
)
# Keys that describe the GGUF itself; ComfyUI-GGUF gives ComfyUI's loader the others as the metadata of a safetensors file.
_OWN_KEYS = ("general.", "tokenizer.", "split.", "quantize.", "imatrix.", "comfy.gguf.", QUANTIZATION_KEY)
_MAX_METADATA = 1 << 22  # characters of all values; a configuration has thousands
_MAX_STRING = 1 << 26  # bytes; a tokenizer in JSON has 30 MB


class _HeaderReader:
    """Sequential reader of header values, limited to :data:`MAX_HEADER` bytes."""

    def __init__(self, file: io.BufferedIOBase):
        self._file = file
        self.position = 0

    def read(self, length: int) -> bytes:
        self.position += length
        if self.position > MAX_HEADER:
            raise ValueError(f"the header exceeds {MAX_HEADER:,} bytes")
        data = self._file.read(length)
        if len(data) < length:
            raise ValueError("the header is truncated")
        return data

    def unpack(self, format: str) -> tuple:
        format = f"<{format}"
        return struct.unpack(format, self.read(struct.calcsize(format)))

    def read_string(self) -> bytes:
        (length,) = self.unpack("Q")
        if length > _MAX_STRING:
            raise ValueError(f"a string of {length:,} bytes")
        return self.read(length)

    def read_value(self) -> object:
        """Return a scalar, a string, or the numbers of an array of at most ``MAX_RANK``; None for any other array."""
        (kind,) = self.unpack("I")
        if kind == GGUFValueType.STRING:
            return self.read_string().decode()
        if kind != GGUFValueType.ARRAY:
            return self.unpack(_SCALARS[GGUFValueType(kind)])[0]
        kind, count = self.unpack("IQ")
        if kind == GGUFValueType.STRING:
            for _ in range(count):
                self.read_string()
            return None
        scalar = _SCALARS[GGUFValueType(kind)]
        data = self.read(count * struct.calcsize(f"<{scalar}"))
        return struct.unpack(f"<{count}{scalar}", data) if count <= MAX_RANK else None


def _metadata(values: dict[str, Any]) -> dict[str, str]:
    """The values that ComfyUI may need, such as ``config`` of LTX-2; ComfyUI tests flags by the truth of the string."""
    architecture = f"{values.get('general.architecture')}."
    kept = {key: value for key, value in values.items() if not key.startswith((*_OWN_KEYS, architecture))}
    texts = {
        key: ("true" if value else "") if isinstance(value, bool) else str(value)
        for key, value in kept.items()
        if isinstance(value, (str, int, float))
    }
    if sum(map(len, texts.values())) > _MAX_METADATA:
        raise ValueError(f"the metadata exceeds {_MAX_METADATA:,} characters")
    return texts


class _Quantized(NamedTuple):
    """Storage of a quantized tensor: its type, and the bytes of one row and of all rows."""

    type: GGMLQuantizationType
    row: int
    nbytes: int


class GGUFFile(TensorFile):
    """Open GGUF file as a :class:`~.source.SampledSource`. A context manager; reading is thread-safe.

    Quantized tensors are dequantized to bfloat16 when they are read.

    Args:
        part: its place in a split GGUF, whose first file has the shapes of tensors in all files.

    Attributes:
        values: key-value pairs of the header; None for an array of strings or of more than ``MAX_RANK`` numbers.
        layers: quantization type → number of tensors dequantized from it.

    Raises:
        SourceError: the file is damaged, or is another part than ``part``.
    """

    def __init__(self, path: str | os.PathLike, part: Part = WHOLE):
        self._part = part
        super().__init__(path)

    def _parse_header(self) -> None:
        buffered = io.BufferedReader(self._file)
        try:
            self._parse(_HeaderReader(buffered))
        finally:
            buffered.detach()

    def _parse(self, header: _HeaderReader) -> None:
        magic, version, tensors, pairs = header.unpack("4sIQQ")
        if magic != b"GGUF":
            raise ValueError("not a GGUF file")
        if version not in _VERSIONS:
            what = f"version {version}" if version < 1 << 16 else "big-endian byte order"
            raise SourceError(
                f"{self.path} is a GGUF file of {what}, and only versions 2 and 3 in little-endian byte order are read; give the "
                "original safetensors file.",
                file=str(self.path),
            )
        if max(tensors, pairs) > _MAX_ENTRIES:
            raise ValueError(f"the header has {max(tensors, pairs):,} entries")
        self.values: dict[str, Any] = {header.read_string().decode(): header.read_value() for _ in range(pairs)}
        self._check_part()
        self.metadata = _metadata(self.values)
        entries = []
        for _ in range(tensors):
            name, (rank,) = header.read_string().decode(), header.unpack("I")
            if rank > MAX_RANK:
                raise ValueError(f"tensor {name} has {rank:,} dimensions")
            entries.append((name, header.unpack(f"{rank}Q"), *header.unpack("IQ")))
        alignment = self.values.get("general.alignment", GGUF_DEFAULT_ALIGNMENT)
        data = -(-header.position // alignment) * alignment
        self._quantized: dict[str, _Quantized] = {}
        shapes = getattr(self._part.first, "values", {}) | self.values
        for name, sides, kind, offset in entries:
            if kind not in _KNOWN_TYPES:
                raise SourceError(
                    f"{self.path}: tensor {name} has the GGML type {kind}, which the installed package gguf does not know; run "
                    "'pip install -U gguf' in ComfyUI's Python, or give the original safetensors file.",
                    file=str(self.path),
                    tensor=name,
                )
            # GGUF stores the innermost dimension first
            shape = shapes.get(_ORIGINAL_SHAPE + name, restore_shape(name, sides[::-1]))
            self._add_entry(name, sides, shape, GGMLQuantizationType(kind), data + offset)
        self.layers = dict(Counter(stored.type.name for stored in self._quantized.values()))

    def _check_part(self) -> None:
        """Raise SourceError if the header declares another place in a split GGUF than the file name."""
        number, count = self.values.get("split.no", self._part.number), self.values.get("split.count", self._part.count)
        if (number, count) == (self._part.number, self._part.count) or count in (0, 1):  # merged files have 0
            return
        place = f"part {self._part.number + 1} of {self._part.count} by its name"
        if self._part.count == 1:
            place = "has a name without the numbers of the parts"
        raise SourceError(
            f"{self.path} is part {number + 1} of {count} of a split GGUF by its header, and {place}; name the parts as "
            "NAME-00001-of-00002.gguf, or merge them with llama-gguf-split --merge.",
            file=str(self.path),
        )

    def _add_entry(
        self, name: str, sides: tuple[int, ...], shape: tuple[int, ...], kind: GGMLQuantizationType, offset: int
    ) -> None:
        if math.prod(shape) != math.prod(sides) or min(shape, default=0) < 0:
            raise ValueError(f"tensor {name} has {math.prod(sides)} values and the shape {list(shape)}")
        if kind in _PLAIN_DTYPES:
            self._add_tensor(name, TensorInfo(_PLAIN_DTYPES[kind], shape), offset)
            return
        block, block_bytes = GGML_QUANT_SIZES[kind]
        if not sides or not math.prod(sides) or sides[0] % block:
            raise ValueError(
                f"the rows of tensor {name}, shape {list(shape)}, are not whole {kind.name} blocks of {block}"
            )
        row = sides[0] // block * block_bytes
        self._quantized[name] = _Quantized(kind, row, row * math.prod(sides[1:]))
        self._add_tensor(name, TensorInfo(_DEQUANTIZED, shape), offset, self._quantized[name].nbytes)

    def read(self, name: str, device: torch.device = CPU) -> torch.Tensor:
        """Load one tensor onto ``device``, dequantized."""
        stored = self._quantized.get(name)
        if stored is None:
            return super().read(name, device)
        blocks = self._read_bytes(name, 0, stored.nbytes, CPU).numpy().reshape(-1, stored.row)
        try:
            values = dequantize(blocks, stored.type)
        except NotImplementedError:
            raise SourceError(
                f"{self.path}: the package gguf cannot dequantize {stored.type.name} of tensor {name}; give the original safetensors file.",
                file=str(self.path),
                tensor=name,
            ) from None
        return torch.from_numpy(values).reshape(self.tensors[name].shape).to(device, _DEQUANTIZED)

    def sample(self, name: str, offset: int, length: int) -> bytes:
        """Return up to ``length`` stored bytes at the relative position of byte ``offset`` of the dequantized tensor."""
        stored = self._quantized.get(name)
        if stored is None:
            return super().sample(name, offset, length)
        start = offset * stored.nbytes // max(1, self.tensors[name].nbytes)
        return super().sample(name, start, min(length, stored.nbytes - start))
