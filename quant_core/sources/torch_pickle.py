"""Weights that torch saved: its pickle is followed, not run, to where in the file each tensor lies.

A pickle is a program for a small machine. This one has no instruction that calls anything: what the program would call is written down,
and of that the few calls that make tensors of plain values are understood.
"""

import io
import pickletools
import struct
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from ..errors import SourceError
from .dtypes import DTYPE_NAMES
from .safetensors import MAX_RANK, TOO_LARGE, StoredTensors
from .source import CPU, TensorInfo

__all__ = ["PickledWeights"]

_NESTED = ("state_dict", "model", "module")  # under which training tools keep the weights
_LARGEST = 1 << 23  # bytes of a pickle; one of ten thousand tensors has two million, and a million take seconds
_MAGIC = 0x1950A86A20F9469CFC6C  # with which files of torch before 1.6 begin
_LOCAL = struct.Struct("<26xHH")  # lengths of name and extra field in the header that a zip has before each file
_HARMLESS = ("torch", "numpy", "collections", "_codecs")  # modules whose names stand beside weights
_BUILTINS = ("set", "frozenset", "dict", "list", "tuple", "int", "float", "bool", "complex", "bytearray", "slice")
_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64,
    "UntypedStorage": torch.uint8,
}
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPE_NAMES}


class _NotWeights(Exception):
    """The pickle names something that is neither weights nor harmless."""


@dataclass(frozen=True)
class _Name:
    """Something that the pickle would import."""

    module: str
    name: str


@dataclass(frozen=True)
class _Made:
    """What the pickle would make, and is not understood here; ``tensor``: it is one, but not of plain values."""

    by: str
    tensor: bool = True


@dataclass(frozen=True)
class _Storage:
    """Values in a row; ``dtype`` and ``count`` as the pickle has them."""

    key: str
    dtype: torch.dtype
    count: int

    @property
    def nbytes(self) -> int:
        return self.count * self.dtype.itemsize


@dataclass(frozen=True)
class _View:
    """A tensor: some values of a storage. ``begin`` and ``span`` in bytes, ``stride`` in values."""

    storage: _Storage
    info: TensorInfo
    begin: int
    span: int
    stride: tuple[int, ...]

    @property
    def in_order(self) -> bool:
        """Without gaps, the last dimension innermost."""
        step = 1
        for side, stride in zip(reversed(self.info.shape), reversed(self.stride), strict=True):
            if side != 1 and stride != step:
                return False
            step *= side
        return True


def _view(
    storage: object, offset: int, shape: tuple, stride: tuple, dtype: torch.dtype | None = None
) -> "_View | _Made":
    if isinstance(storage, _Made):
        return storage
    if not isinstance(storage, _Storage) or not len(shape) == len(stride) <= MAX_RANK:
        raise ValueError("a tensor without a storage or a shape")
    dtype = dtype or storage.dtype
    if not all(type(number) is int and 0 <= number < TOO_LARGE for number in (offset, *shape, *stride)):
        raise ValueError("a tensor whose place is no whole number")
    info = TensorInfo(dtype, tuple(shape))
    span = (
        (1 + sum((side - 1) * step for side, step in zip(shape, stride, strict=True))) * dtype.itemsize
        if info.nbytes
        else 0
    )
    begin = offset * dtype.itemsize
    if begin + span > storage.nbytes or info.nbytes > storage.nbytes:
        raise ValueError(f"a tensor of {info.nbytes:,} bytes in {storage.nbytes:,}")
    return _View(storage, info, begin, span, tuple(stride))


def _tensor(storage, offset, shape, stride, *more) -> object:
    special = more[-1] if more and isinstance(more[-1], dict) and len(more) > 2 else {}
    if any(special.get(kind) for kind in ("conj", "neg")):
        return _Made("with a sign that is not applied")
    return _view(storage, offset, shape, stride)


def _tensor_of_dtype(storage, offset, shape, stride, requires_grad, hooks, dtype, *more) -> object:
    if not isinstance(dtype, _Name) or dtype.name not in _DTYPES:
        return _Made(f"torch.{dtype.name}" if isinstance(dtype, _Name) else "no dtype")
    return _view(storage, offset, shape, stride, _DTYPES[dtype.name])


def _table(pairs=()) -> dict:
    return {key: value for key, value in pairs if isinstance(key, str)}


# What the calls of a pickle that are understood make.
_CALLS: dict[tuple[str, str], Callable] = {
    ("collections", "OrderedDict"): _table,
    ("torch._utils", "_rebuild_tensor"): _tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_tensor_v3"): _tensor_of_dtype,
    ("torch._utils", "_rebuild_parameter"): lambda tensor, *more: tensor,
    ("torch._utils", "_rebuild_parameter_with_state"): lambda tensor, *more: tensor,
}


def _called(what: object, arguments: tuple) -> object:
    if not isinstance(what, _Name):
        return _Made(type(what).__name__, tensor=False)
    make = _CALLS.get((what.module, what.name))
    return make(*arguments) if make else _Made(f"{what.module}.{what.name}", tensor="_rebuild_" in what.name)


def _named(module: object, name: object) -> _Name:
    if type(module) is not str or type(name) is not str:  # anything else may take forever to write out, or to look up
        raise ValueError("a name that is no text")
    known = name in _BUILTINS if module in ("builtins", "__builtin__") else module.split(".")[0] in _HARMLESS
    if not known:
        raise _NotWeights(f"{module}.{name}")
    return _Name(module, name)


_OF_CLASS = _Name(
    "torch._tensor", "_rebuild_from_type_v2"
)  # called with (what to call, a class, its arguments, attributes)


def _stored(identity: object) -> _Storage | _Made:
    """What a persistent id of torch means."""
    if not isinstance(identity, tuple) or not 5 <= len(identity) <= 6 or type(identity[2]) is not str:
        raise ValueError("a storage that is not told as torch tells it")
    kind, storage, key, _, count, *view = identity
    if kind != "storage" or any(view) or type(count) is not int or not 0 <= count < TOO_LARGE:
        raise ValueError("a storage of an unknown kind")
    if not isinstance(storage, _Name) or storage.name not in _STORAGES:
        return _Made(storage.name if isinstance(storage, _Name) else "no storage")
    return _Storage(key, _STORAGES[storage.name], count)


class _Machine:
    """Follows one pickle."""

    def __init__(self):
        self.stack, self.marks, self.memo = [], [], {}
        self.storages: dict[str, _Storage] = {}

    def run(self, stream: io.BytesIO) -> object:
        """What the pickle that begins here makes; the stream is behind it then."""
        self.left = stream.getbuffer().nbytes  # items for calls: no honest pickle hands over more than it has bytes
        for opcode, argument, _ in pickletools.genops(stream):
            step = _STEPS.get(opcode.name)
            if step is None:
                raise ValueError(f"a pickle with {opcode.name}")
            step(self, argument)
        return self.stack.pop()

    def above(self) -> list:
        """What was pushed since the last mark, taken off."""
        return self.take(len(self.stack) - self.marks.pop())

    def take(self, count: int) -> list:
        if not 0 <= count <= len(self.stack):
            raise ValueError("a pickle that takes more than it has")
        items = self.stack[len(self.stack) - count :]
        del self.stack[len(self.stack) - count :]
        return items

    def fill(self, items: list) -> None:
        """Into the list, set or dict on top."""
        top = self.stack[-1]
        if isinstance(top, dict):
            top.update(_table(zip(items[::2], items[1::2], strict=True)))
        elif isinstance(top, list):
            top.extend(items)

    def call(self) -> None:
        what, arguments = self.take(2)
        while what == _OF_CLASS:
            what, _, arguments, _ = self.handed(arguments)
        self.stack.append(_called(what, self.handed(arguments)))

    def handed(self, arguments: object) -> tuple:
        """The arguments of a call, counted: one list could be given to any number of calls."""
        if not isinstance(arguments, tuple):
            raise ValueError("a call whose arguments are no tuple")
        self.left -= sum(len(items) for items in (arguments, *arguments) if isinstance(items, (tuple, list, dict)))
        if self.left < 0:
            raise ValueError("a pickle that hands over more than it holds")
        return arguments

    def store(self, storage: _Storage | _Made) -> None:
        if isinstance(storage, _Storage):
            self.storages[storage.key] = storage
        self.stack.append(storage)


def _push(make: Callable[[object], object]) -> Callable[[_Machine, object], None]:
    return lambda machine, argument: machine.stack.append(make(argument))


def _ignore(machine: _Machine, argument: object) -> None:
    """Says nothing of weights."""


_TEXTS = ("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8")
_BYTES = ("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8")
_NUMBERS = ("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT")
_STEPS: dict[str, Callable[[_Machine, object], None]] = {
    **dict.fromkeys((*_TEXTS, *_BYTES, *_NUMBERS), _push(lambda argument: argument)),
    **dict.fromkeys(("PROTO", "FRAME", "STOP"), _ignore),
    "NONE": _push(lambda _: None),
    "NEWTRUE": _push(lambda _: True),
    "NEWFALSE": _push(lambda _: False),
    "EMPTY_TUPLE": _push(lambda _: ()),
    "EMPTY_LIST": _push(lambda _: []),
    "EMPTY_SET": _push(lambda _: []),
    "EMPTY_DICT": _push(lambda _: {}),
    "GLOBAL": _push(lambda argument: _named(*argument.split(" ", 1))),
    "MARK": lambda machine, _: machine.marks.append(len(machine.stack)),
    "POP": lambda machine, _: machine.stack.pop(),
    "POP_MARK": lambda machine, _: machine.above(),
    "DUP": lambda machine, _: machine.stack.append(machine.stack[-1]),
    "TUPLE": lambda machine, _: machine.stack.append(tuple(machine.above())),
    "TUPLE1": lambda machine, _: machine.stack.append(tuple(machine.take(1))),
    "TUPLE2": lambda machine, _: machine.stack.append(tuple(machine.take(2))),
    "TUPLE3": lambda machine, _: machine.stack.append(tuple(machine.take(3))),
    "LIST": lambda machine, _: machine.stack.append(machine.above()),
    "FROZENSET": lambda machine, _: machine.stack.append(machine.above()),
    "DICT": lambda machine, _: (items := machine.above(), machine.stack.append({}), machine.fill(items)),
    "APPEND": lambda machine, _: machine.fill(machine.take(1)),
    "APPENDS": lambda machine, _: machine.fill(machine.above()),
    "ADDITEMS": lambda machine, _: machine.fill(machine.above()),
    "SETITEM": lambda machine, _: machine.fill(machine.take(2)),
    "SETITEMS": lambda machine, _: machine.fill(machine.above()),
    "STACK_GLOBAL": lambda machine, _: machine.stack.append(_named(*machine.take(2))),
    "REDUCE": lambda machine, _: machine.call(),
    "NEWOBJ": lambda machine, _: machine.call(),
    "BUILD": lambda machine, _: machine.take(1),  # attributes of what is no plain value
    "BINPERSID": lambda machine, _: machine.store(_stored(machine.stack.pop())),
    **dict.fromkeys(
        ("PUT", "BINPUT", "LONG_BINPUT"),
        lambda machine, argument: machine.memo.__setitem__(argument, machine.stack[-1]),
    ),
    "MEMOIZE": lambda machine, _: machine.memo.__setitem__(len(machine.memo), machine.stack[-1]),
    **dict.fromkeys(
        ("GET", "BINGET", "LONG_BINGET"), lambda machine, argument: machine.stack.append(machine.memo[argument])
    ),
}


class PickledWeights(StoredTensors):
    """Weights that torch saved as a :class:`~.source.SampledSource`: no code in the file is run. A context manager.

    Raises:
        SourceError: the file holds more than weights, or other tensors than plain ones, or is damaged.
    """

    def _parse(self) -> None:
        try:
            loaded, places = self._zipped() if self._file.read(2) == b"PK" else self._plain()
        except _NotWeights as error:
            raise SourceError(
                f"{self.path} holds more than weights ({error}), and what is in a pickle could run as code: it is not opened. "
                "Convert it to safetensors where you trust it."
            ) from None
        for name, value in self._weights(loaded):
            self._take(name, value, places)
        if not self.tensors:
            raise SourceError(f"{self.path} holds no weights by name; give a model's state dict.")
        self.size = sum(info.nbytes for info in self.tensors.values())

    def _take(self, name: str, value: _View | _Made, places: dict[str, tuple[int, int]]) -> None:
        if isinstance(value, _Made):
            raise SourceError(
                f"{self.path}: tensor {name} is none of plain values ({value.by}); save the model with plain tensors."
            )
        begin, length = places[value.storage.key]
        if length != value.storage.nbytes:
            raise ValueError(f"tensor {name} needs {value.storage.nbytes:,} bytes and is given {length:,}")
        self._place(name, value.info, begin + value.begin, value.span)
        if not value.in_order:
            self._views[name] = value

    def _weights(self, loaded: object) -> Iterator[tuple[str, _View | _Made]]:
        """The tensors by name, of a state dict or of what training tools wrap around it."""
        self._views: dict[str, _View] = {}
        for key in _NESTED:
            if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
                loaded = loaded[key]
        for name, value in loaded.items() if isinstance(loaded, dict) else ():
            if isinstance(value, _View) or isinstance(value, _Made) and value.tensor:
                yield name, value

    def _zipped(self) -> tuple[object, dict[str, tuple[int, int]]]:
        """What the pickle in the archive makes, and {storage: (where it begins, its bytes)}."""
        with zipfile.ZipFile(self._file) as archive:
            files = {entry.filename: entry for entry in archive.infolist()}
        if any(entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1 for entry in files.values()):
            raise SourceError(
                f"{self.path} is compressed, which torch's own files never are; unpack it and save it with torch again."
            )
        (main,) = (name for name in files if name.endswith("/data.pkl"))
        folder = main.removesuffix("data.pkl")
        places = {name: self._lies(entry) for name, entry in files.items() if name.startswith(folder)}
        order = places.get(f"{folder}byteorder")
        if order and self._bytes(*order) != b"little":
            raise SourceError(
                f"{self.path} was written by a machine of the other byte order; save it again on this one."
            )
        if places[main][1] > _LARGEST:
            raise ValueError(f"a pickle of {places[main][1]:,} bytes")
        made = _Machine().run(io.BytesIO(self._bytes(*places[main])))
        prefix = f"{folder}data/"
        return made, {name.removeprefix(prefix): place for name, place in places.items() if name.startswith(prefix)}

    def _lies(self, entry: zipfile.ZipInfo) -> tuple[int, int]:
        name, extra = _LOCAL.unpack(self._bytes(entry.header_offset, _LOCAL.size))
        return entry.header_offset + _LOCAL.size + name + extra, entry.file_size

    def _plain(self) -> tuple[object, dict[str, tuple[int, int]]]:
        """As :meth:`_zipped`, of a file of torch before 1.6: four pickles, the names of all storages, then these."""
        stream = io.BytesIO(self._bytes(0, min(self.size, _LARGEST)))
        magic, _, system = (_Machine().run(stream) for _ in range(3))
        if magic != _MAGIC or not isinstance(system, dict) or not system.get("little_endian", True):
            raise ValueError("not as torch saves weights")
        machine = _Machine()
        made, keys = machine.run(stream), _Machine().run(stream)
        places, begin = {}, stream.tell()
        for key in keys:
            if type(key) is not str:
                raise ValueError("a storage whose name is no text")
            (count,) = struct.unpack("<q", self._bytes(begin, 8))
            places[key] = begin + 8, count * machine.storages[key].dtype.itemsize
            begin += 8 + places[key][1]
        return made, places

    def read(self, name: str, device: torch.device = CPU) -> torch.Tensor:
        view = self._views.get(name)
        if view is None:
            return super().read(name, device)
        values = self._values(name, 0, view.span, device).view(view.info.dtype)
        return values.as_strided(view.info.shape, view.stride).contiguous()

    def sample(self, name: str, offset: int, length: int) -> bytes:
        if name not in self._views:
            return super().sample(name, offset, length)
        return self.read(name).flatten().view(torch.uint8)[offset : offset + length].numpy().tobytes()
