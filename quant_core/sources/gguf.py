"""GGUF files as a source: read here, decoded by the package ``gguf``. Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md"""

import io
import math
import os
import struct
from collections import Counter

import torch

from ..errors import MissingPackageError, SourceError
from .safetensors import MAX_HEADER, MAX_RANK, StoredTensors
from .source import CPU, TensorInfo

__all__ = ["GGUFFile"]

_PLAIN = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_PLAIN |= {"I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64}
_DECODED = torch.bfloat16  # has the range of every scale; its rounding is a tenth of that of 8-bit codes
_SHAPE = "comfy.gguf.orig_shape."  # + name: of a tensor that was given another shape to be coded in whole blocks
_ENCODERS = ("t5", "t5encoder", "llama", "qwen2vl", "qwen3", "qwen3vl", "gemma2", "gemma3", "mistral3")
_VERSIONS = (2, 3)
_NUMBERS = dict(enumerate("BbHhIif?", 0)) | dict(enumerate("Qqd", 10))  # kind of a value → its letter in struct
_STRING, _ARRAY = 8, 9
_ALIGNMENT = 32


class _Fields:
    """The values of a header, one after another; no more than :data:`MAX_HEADER` bytes of them."""

    def __init__(self, file: io.BufferedReader):
        self.file = file

    def take(self, count: int) -> bytes:
        if count > MAX_HEADER - self.file.tell():
            raise ValueError(f"a header of more than {MAX_HEADER:,} bytes")
        data = self.file.read(count)
        if len(data) < count:
            raise ValueError("its header ends early")
        return data

    def numbers(self, letters: str) -> tuple:
        form = struct.Struct(f"<{letters}")
        return form.unpack(self.take(form.size))

    def text(self) -> str:
        return self.take(self.numbers("Q")[0]).decode()

    def value(self, kind: int) -> object:
        """A number, a text, or the numbers of a short list; None for other lists."""
        if kind in _NUMBERS:
            return self.numbers(_NUMBERS[kind])[0]
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY:
            raise ValueError(f"a value of the unknown kind {kind}")
        kind, count = self.numbers("IQ")
        if kind == _STRING:
            for _ in range(count):
                self.take(self.numbers("Q")[0])
            return None
        letter = _NUMBERS[kind]
        data = self.take(count * struct.calcsize(f"<{letter}"))
        return struct.unpack(f"<{count}{letter}", data) if count <= MAX_RANK else None


class GGUFFile(StoredTensors):
    """A diffusion model in GGUF as a :class:`~.source.SampledSource`; codes are decoded, to bfloat16, when they are read. A context manager.

    Attributes:
        layers: type of code → how many tensors are decoded from it.

    Raises:
        MissingPackageError: ``gguf`` is not installed.
        SourceError: the file is damaged, or names its tensors as llama.cpp does.
    """

    def __init__(self, path: str | os.PathLike):
        try:
            import gguf
        except ImportError:
            raise MissingPackageError(
                "GGUF files need a package that is not installed here: run 'pip install gguf' in ComfyUI's Python, or give the "
                "original safetensors."
            ) from None
        self._package = gguf
        super().__init__(path)

    def _parse(self) -> None:
        buffered = io.BufferedReader(self._file)
        try:
            self._header(_Fields(buffered))
        finally:
            buffered.detach()

    def _header(self, fields: _Fields) -> None:
        magic, version, tensors, pairs = fields.numbers("4sIQQ")
        if magic != b"GGUF" or version not in _VERSIONS:
            raise ValueError("no GGUF file of a version that is known")
        known = {}
        for _ in range(pairs):
            key = fields.text()
            known[key] = fields.value(*fields.numbers("I"))
        if known.get("general.architecture") in _ENCODERS:
            raise SourceError(
                f"{self.path} is a text encoder ({known['general.architecture']}) with the names that llama.cpp gives to its tensors; "
                "give the original safetensors."
            )
        entries = []
        for _ in range(tensors):
            name, (rank,) = fields.text(), fields.numbers("I")
            if rank > MAX_RANK:
                raise ValueError(f"tensor {name} has {rank:,} dimensions")
            entries.append((name, fields.numbers(f"{rank}Q"), *fields.numbers("IQ")))
        alignment = known.get("general.alignment", _ALIGNMENT)
        start = -(-fields.file.tell() // alignment) * alignment
        self._coded: dict[str, tuple] = {}  # name → (type of its code, bytes of a row, bytes)
        for name, sides, kind, offset in entries:
            self._entry(name, sides, self._package.GGMLQuantizationType(kind), start + offset, known.get(_SHAPE + name))
        self.layers = dict(Counter(kind.name for kind, _, _ in self._coded.values()))

    def _entry(self, name: str, sides: tuple[int, ...], kind, begin: int, kept: tuple[int, ...] | None) -> None:
        """``sides``: innermost first; ``kept``: the shape that the tensor had before it was coded."""
        shape = tuple(reversed(sides)) if kept is None else kept
        if math.prod(shape) != math.prod(sides) or min(shape, default=0) < 0:
            raise ValueError(f"{name} has {math.prod(sides)} values and the shape {list(shape)}")
        if kind.name in _PLAIN:
            self._place(name, TensorInfo(_PLAIN[kind.name], shape), begin)
            return
        block, size = self._package.GGML_QUANT_SIZES[kind]
        if not sides or not math.prod(sides) or sides[0] % block:
            raise ValueError(f"{name} has the shape {list(shape)}, of which rows in blocks of {block} cannot be made")
        row = sides[0] // block * size
        self._coded[name] = kind, row, row * math.prod(sides[1:])
        self._place(name, TensorInfo(_DECODED, shape), begin, self._coded[name][2])

    def read(self, name: str, device: torch.device = CPU) -> torch.Tensor:
        """The tensor on ``device``, decoded."""
        if name not in self._coded:
            return super().read(name, device)
        kind, row, size = self._coded[name]
        codes = self._values(name, 0, size, CPU).numpy().reshape(-1, row)
        try:
            values = self._package.dequantize(codes, kind)
        except NotImplementedError:
            raise SourceError(
                f"{self.path}: tensor {name} is coded as {kind.name}, which cannot be decoded; give the original safetensors."
            ) from None
        return torch.from_numpy(values).reshape(self.tensors[name].shape).to(device, _DECODED)

    def sample(self, name: str, offset: int, length: int) -> bytes:
        """``length`` bytes of the stored codes, from where byte ``offset`` of the decoded tensor is."""
        if name not in self._coded:
            return super().sample(name, offset, length)
        size = self._coded[name][2]
        start = offset * size // max(1, self.tensors[name].nbytes)
        return super().sample(name, start, min(length, size - start))
