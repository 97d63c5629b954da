"""Checkpoints of ``torch.save``, zip and legacy format, read without executing their pickles.

``torch.load(weights_only=True)`` is not used: it loads all tensors at once, and its ``mmap=True`` rejects the legacy format.
"""

import io
import re
import struct
import zipfile
from collections.abc import Iterator
from typing import TypeGuard

import torch

from ..errors import SourceError
from .source import CPU
from .tensor_file import TensorFile
from .unpickler import ForbiddenGlobal, Opaque, StridedTensor, Unpickler

__all__ = ["PickleFile"]

_MAX_PICKLE = 3 << 20  # bytes; a pickle of 10,000 tensors has 2 MB, and each byte can allocate a list of 80 bytes
_NESTED_KEYS = ("state_dict", "model", "module")  # keys of the state dict in a training checkpoint
_AVERAGED = re.compile(r"(^|_)ema(_|$)")  # in the key of a state dict of averaged weights, such as params_ema
# Suffix of a file in other zip archives → what the archive is.
_OTHER_ARCHIVES = {"/constants.pkl": "a TorchScript program", ".npy": "a NumPy archive"}
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # torch.serialization.MAGIC_NUMBER
_ZIP_LOCAL_HEADER = struct.Struct("<26xHH")  # lengths of the file name and the extra field


_Places = dict[str, tuple[int, int]]  # storage key → (offset in the file, bytes)


class _SeveralStateDicts(Exception):
    """A checkpoint has several state dicts; the message is their keys."""


class PickleFile(TensorFile):
    """Open PyTorch checkpoint as a :class:`~.source.SampledSource`; no code in it is executed. A context manager.

    Raises:
        SourceError: the file is damaged, contains other objects than data, or tensors that are not dense.
    """

    def _parse_header(self) -> None:
        try:
            loaded, places = self._parse_zip() if self._file.read(2) == b"PK" else self._parse_legacy()
        except ForbiddenGlobal as error:
            raise SourceError(
                f"{self.path} contains the object {error}, which could execute code, and was not opened; convert it to safetensors on a "
                "system where you trust it.",
                file=str(self.path),
            ) from None
        try:
            found = list(_find_tensors(loaded))
        except _SeveralStateDicts as error:
            raise SourceError(
                f"{self.path} contains several state dicts ({str(error)[:300]}), and ComfyUI reads none of them; save the one to use alone.",
                file=str(self.path),
            ) from None
        self._views: dict[str, StridedTensor] = {}
        for name, value in found:
            if isinstance(value, Opaque):
                raise SourceError(
                    f"{self.path}: tensor {name} is not a plain dense tensor ({value.description}); save the model with plain tensors.",
                    file=str(self.path),
                    tensor=name,
                )
            if value.storage.key not in places:
                raise ValueError(f"the storage {value.storage.key!r} of tensor {name} is missing")
            self._add_view(name, value, *places[value.storage.key])
        if not self.tensors:
            raise SourceError(
                f"{self.path} contains no named tensors; give the state dict of a model.", file=str(self.path)
            )
        self.size = sum(info.nbytes for info in self.tensors.values())

    def _add_view(self, name: str, view: StridedTensor, begin: int, length: int) -> None:
        """Register a tensor on the storage of ``length`` bytes at ``begin``."""
        if length != view.storage.nbytes:
            raise ValueError(f"the storage of tensor {name} needs {view.storage.nbytes:,} bytes and has {length:,}")
        self._add_tensor(name, view.info, begin + view.offset, view.span)
        if not view.is_contiguous:
            self._views[name] = view

    def _parse_zip(self) -> tuple[object, _Places]:
        """Return the unpickled data of a zip checkpoint and the place of each storage."""
        try:
            with zipfile.ZipFile(self._file) as archive:
                files = {entry.filename: entry for entry in archive.infolist()}
        except zipfile.BadZipFile:
            raise SourceError(
                f"{self.path} is truncated: the directory of its zip archive, at the end of the file, is missing; download it again.",
                file=str(self.path),
            ) from None
        pickles = [name for name in files if name.endswith("/data.pkl")]
        found = [what for suffix, what in _OTHER_ARCHIVES.items() if any(name.endswith(suffix) for name in files)]
        if found or not pickles:
            raise SourceError(
                f"{self.path} is {found[0] if found else 'a zip archive'} and not the state dict of a model; give that, or unpack the "
                "model in it.",
                file=str(self.path),
            )
        if any(entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1 for entry in files.values()):
            raise SourceError(
                f"{self.path} is compressed or encrypted, unlike files of torch.save; unpack it and save it with torch again.",
                file=str(self.path),
            )
        if len(pickles) != 1:
            raise ValueError(f"the archive has {len(pickles)} files data.pkl")
        folder = pickles[0].removesuffix("data.pkl")
        places = {
            name.removeprefix(folder): self._locate(entry) for name, entry in files.items() if name.startswith(folder)
        }
        if "byteorder" in places and self._read_header(*places["byteorder"]) != b"little":
            raise SourceError(
                f"{self.path} has big-endian byte order; save it again on a little-endian system.", file=str(self.path)
            )
        offset, length = places["data.pkl"]
        if length > _MAX_PICKLE:
            raise ValueError(f"a pickle of {length:,} bytes exceeds {_MAX_PICKLE:,}")
        loaded = Unpickler(io.BytesIO(self._read_header(offset, length))).load()
        return loaded, {name.removeprefix("data/"): place for name, place in places.items() if name.startswith("data/")}

    def _locate(self, entry: zipfile.ZipInfo) -> tuple[int, int]:
        """Return the offset and the length of a stored file of the archive."""
        name, extra = _ZIP_LOCAL_HEADER.unpack(self._read_header(entry.header_offset, _ZIP_LOCAL_HEADER.size))
        return entry.header_offset + _ZIP_LOCAL_HEADER.size + name + extra, entry.file_size

    def _parse_legacy(self) -> tuple[object, _Places]:
        """As :meth:`_parse_zip`, for torch before 1.6: magic, protocol, system, data, storage keys; then the storages in that order."""
        stream = io.BytesIO(self._read_header(0, min(self.size, _MAX_PICKLE)))
        magic, _, system = (Unpickler(stream).load() for _ in range(3))
        if magic != _LEGACY_MAGIC or not isinstance(system, dict) or not system.get("little_endian", True):
            raise ValueError("not a file of torch.save")
        unpickler = Unpickler(stream)
        loaded, keys = unpickler.load(), Unpickler(stream).load()
        places, offset = {}, stream.tell()
        for key in keys:
            if type(key) is not str:
                raise ValueError("a storage key is not a string")
            (count,) = struct.unpack("<q", self._read_header(offset, 8))
            places[key] = offset + 8, count * unpickler.storages[key].dtype.itemsize
            offset = sum(places[key])
        return loaded, places

    def read(self, name: str, device: torch.device = CPU) -> torch.Tensor:
        """Load one tensor onto ``device``, contiguous."""
        view = self._views.get(name)
        if view is None:
            return super().read(name, device)
        values = self._read_bytes(name, 0, view.span, device).view(view.info.dtype)
        return values.as_strided(view.info.shape, view.stride).contiguous()

    def sample(self, name: str, offset: int, length: int) -> bytes:
        """Return ``length`` bytes of a tensor, starting at byte ``offset`` of its contiguous memory."""
        if name not in self._views:
            return super().sample(name, offset, length)
        return self.read(name).flatten().view(torch.uint8)[offset : offset + length].numpy().tobytes()


def _is_tensor(value: object) -> TypeGuard[StridedTensor | Opaque]:
    return isinstance(value, StridedTensor) or (isinstance(value, Opaque) and value.is_tensor)


def _holds_tensors(table: dict[str, object]) -> bool:
    """Whether this is a state dict, or a training checkpoint inside another one."""
    return any(_is_tensor(value) or (isinstance(value, dict) and key in _NESTED_KEYS) for key, value in table.items())


def _nested_key(loaded: dict[str, object]) -> str | None:
    """Key of the state dict in a training checkpoint; None where ``loaded`` is the state dict.

    ``state_dict``, or the only key, is what ComfyUI reads.

    Raises:
        _SeveralStateDicts: none of them is the one that ComfyUI would read.
    """
    tables = {key: value for key, value in loaded.items() if isinstance(value, dict)}
    if "state_dict" in tables or len(loaded) == len(tables) == 1:
        return "state_dict" if "state_dict" in tables else next(iter(tables))
    distinct = {id(value): value for value in tables.values()}  # a pickle can contain one table any number of times
    holding = {number for number, value in distinct.items() if _holds_tensors(value)}
    found = [key for key, value in tables.items() if id(value) in holding]
    known = next((key for key in _NESTED_KEYS if key in found), None)
    if known is None and any(isinstance(value, StridedTensor) and value.info.shape for value in loaded.values()):
        return None
    rivals = [key for key in found if _AVERAGED.search(key)] if known else found[1:]
    if rivals:
        raise _SeveralStateDicts(", ".join([known or found[0], *rivals]))
    return known or next(iter(found), None)


def _find_tensors(loaded: object) -> Iterator[tuple[str, StridedTensor | Opaque]]:
    """Yield the tensors of a state dict, or of the state dict in a training checkpoint."""
    for _ in _NESTED_KEYS:
        key = _nested_key(loaded) if isinstance(loaded, dict) else None
        loaded = loaded[key] if isinstance(loaded, dict) and key is not None else loaded
    for name, value in loaded.items() if isinstance(loaded, dict) else ():
        if _is_tensor(value):
            yield name, value
