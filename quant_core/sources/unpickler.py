"""Restricted unpickler of ``torch.save``: tensors as descriptions, without importing or calling anything that a pickle names."""

import io
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch

from .dtypes import DTYPE_NAMES
from .source import TensorInfo
from .tensor_file import MAX_RANK, SIZE_LIMIT

__all__ = ["ForbiddenGlobal", "Opaque", "Storage", "StridedTensor", "Unpickler"]

_MAX_GLOBAL = 256  # characters of the module and the name of a global
_DATA_MODULES = ("torch", "numpy", "collections", "_codecs")  # their globals occur in checkpoints of plain data
# In checkpoints of Stable Diffusion 1; ComfyUI's loader accepts it too.
_CALLBACK = ("pytorch_lightning.callbacks.model_checkpoint", "ModelCheckpoint")
_DATA_BUILTINS = ("set", "frozenset", "dict", "list", "tuple", "int", "float", "bool", "complex", "bytearray", "slice")
_STORAGE_DTYPES = {
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


class ForbiddenGlobal(Exception):
    """The pickle refers to a class or function that plain data does not need."""


@dataclass(frozen=True, slots=True)
class _Global:
    """Name of a class or function; it is never imported."""

    module: str
    name: str


@dataclass(frozen=True, slots=True)
class Opaque:
    """Value that is not needed, or tensor that is not supported; items added to it are dropped."""

    description: str
    is_tensor: bool = False

    def _drop(self, *values: object) -> None:
        pass

    append = extend = add = __setitem__ = _drop


_SET = Opaque("set")


class _Table(dict):
    """Dictionary that drops keys other than strings: hashing a nested tuple can take exponential time."""

    __slots__ = ()

    def __setitem__(self, key: object, value: object) -> None:
        if type(key) is str:
            super().__setitem__(key, value)


@dataclass(frozen=True, slots=True)
class Storage:
    """Storage as the pickle declares it."""

    key: str
    dtype: torch.dtype
    count: int

    @property
    def nbytes(self) -> int:
        return self.count * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class StridedTensor:
    """Strided tensor on a storage. ``offset`` and ``span`` in bytes, ``stride`` in values."""

    storage: Storage
    info: TensorInfo
    offset: int
    span: int
    stride: tuple[int, ...]

    @property
    def is_contiguous(self) -> bool:
        step = 1
        for side, stride in zip(reversed(self.info.shape), reversed(self.stride), strict=True):
            if side != 1 and stride != step:
                return False
            step *= side
        return True


def _build_view(storage: object, offset: int, shape: tuple, stride: tuple, dtype: torch.dtype | None = None) -> object:
    if isinstance(storage, Opaque):
        return storage
    if not isinstance(storage, Storage) or not len(shape) == len(stride) <= MAX_RANK:
        raise ValueError("a tensor has no storage, or its shape and stride do not match")
    if not all(type(number) is int and 0 <= number < SIZE_LIMIT for number in (offset, *shape, *stride)):
        raise ValueError("offset, shape and stride of a tensor are not integers from 0 to 2^63")
    info = TensorInfo(dtype or storage.dtype, tuple(shape))
    last = sum((side - 1) * step for side, step in zip(shape, stride, strict=True))
    span = (last + 1) * info.dtype.itemsize if info.nbytes else 0
    begin = offset * info.dtype.itemsize
    if begin + span > storage.nbytes or info.nbytes > storage.nbytes:
        raise ValueError(f"a tensor of {info.nbytes:,} bytes exceeds its storage of {storage.nbytes:,}")
    return StridedTensor(storage, info, begin, span, tuple(stride))


def _rebuild_tensor(storage, offset, shape, stride, *more) -> object:
    """``more``: requires_grad, backward hooks, and flags of a lazily conjugated or negated tensor."""
    flags = more[-1] if len(more) > 2 and isinstance(more[-1], dict) else {}
    if flags.get("conj") or flags.get("neg"):
        return Opaque("conjugate or negative view", is_tensor=True)
    return _build_view(storage, offset, shape, stride)


def _rebuild_tensor_of_dtype(storage, offset, shape, stride, requires_grad, hooks, dtype, *more) -> object:
    name = dtype.name if isinstance(dtype, _Global) else "unknown dtype"
    if name not in _DTYPES:
        return Opaque(name, is_tensor=True)
    return _build_view(storage, offset, shape, stride, _DTYPES[name])


def _build_table(pairs=()) -> _Table:
    table = _Table()
    for key, value in pairs:
        table[key] = value
    return table


_REBUILD_FROM_TYPE = _Global("torch._tensor", "_rebuild_from_type_v2")  # arguments: function, type, arguments, state
_BUILDERS: dict[_Global, Callable[..., object]] = {
    _Global("collections", "OrderedDict"): _build_table,
    _Global("torch._utils", "_rebuild_tensor"): _rebuild_tensor,
    _Global("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    _Global("torch._utils", "_rebuild_tensor_v3"): _rebuild_tensor_of_dtype,
    _Global("torch._utils", "_rebuild_parameter"): lambda tensor, *more: tensor,
    _Global("torch._utils", "_rebuild_parameter_with_state"): lambda tensor, *more: tensor,
}

# Opcodes that only move plain values, lists and tuples. Those of protocol 0 alone are not used by torch, whose persistent ids need
# protocol 1; Python 2 writes INT for large integers.
_PLAIN_OPCODES = """
    PROTO FRAME STOP MARK POP POP_MARK DUP NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 LONG1 LONG4 BINFLOAT
    BINSTRING SHORT_BINSTRING BINUNICODE SHORT_BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES BINBYTES8
    EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST APPEND APPENDS SETITEM SETITEMS ADDITEMS
    GLOBAL STACK_GLOBAL BINPERSID BINPUT LONG_BINPUT MEMOIZE BINGET LONG_BINGET
""".split()


class Unpickler(pickle._Unpickler):
    """The pure Python unpickler of the standard library, restricted to descriptions of tensors."""

    stack: list  # attributes of the base class that typeshed does not declare
    append: Callable[[object], None]
    pop_mark: Callable[[], list]

    def __init__(self, stream: io.BytesIO):
        super().__init__(stream, encoding="latin-1")
        self.storages: dict[str, Storage] = {}
        self._budget = stream.getbuffer().nbytes  # arguments of all calls; each takes a byte of a valid pickle

    def find_class(self, module: str, name: str) -> _Global:
        if len(module) + len(name) > _MAX_GLOBAL:
            raise ValueError(f"a global name of {len(module) + len(name):,} characters")
        allowed = (
            name in _DATA_BUILTINS if module in ("builtins", "__builtin__") else module.split(".")[0] in _DATA_MODULES
        )
        if not allowed and (module, name) != _CALLBACK:
            raise ForbiddenGlobal(f"{module}.{name}")
        return _Global(module, name)

    def persistent_load(self, pid: object) -> Storage | Opaque:
        """Return the storage of ("storage", storage type, key, device, count, [view metadata])."""
        if not isinstance(pid, tuple) or not 5 <= len(pid) <= 6 or type(pid[2]) is not str:
            raise ValueError("a persistent id is not a storage")
        kind, storage_type, key, _, count, *view = pid
        if kind != "storage" or any(view) or type(count) is not int or not 0 <= count < SIZE_LIMIT:
            raise ValueError("a persistent id is not a storage")
        name = storage_type.name if isinstance(storage_type, _Global) else "unknown storage"
        if name not in _STORAGE_DTYPES:
            return Opaque(name, is_tensor=True)
        self.storages[key] = Storage(key, _STORAGE_DTYPES[name], count)
        return self.storages[key]

    def _check_arguments(self, arguments: object) -> tuple:
        """Bound the total number of arguments: a pickle can pass one long list to any number of calls."""
        if not isinstance(arguments, tuple):
            raise ValueError("the arguments of a call are not a tuple")
        self._budget -= sum(len(items) for items in (arguments, *arguments) if isinstance(items, (tuple, list, dict)))
        if self._budget < 0:
            raise ValueError("calls with more arguments than the pickle has bytes")
        return arguments

    def _load_call(self) -> None:
        arguments = self._check_arguments(self.stack.pop())
        function = self.stack.pop()
        if function == _REBUILD_FROM_TYPE:
            function, _, inner, _ = arguments
            arguments = self._check_arguments(inner)
        if not isinstance(function, _Global):
            self.append(Opaque("unknown call"))
        elif function in _BUILDERS:
            self.append(_BUILDERS[function](*arguments))
        else:
            self.append(Opaque(f"{function.module}.{function.name}", is_tensor=function.name.startswith("_rebuild_")))

    def _load_state(self) -> None:
        """Drop the attributes of an object."""
        self.stack.pop()

    def _load_frozenset(self) -> None:
        self.pop_mark()
        self.append(_SET)

    def _reject(self) -> None:
        raise ValueError("the pickle has an opcode that plain tensors do not need")

    dispatch: ClassVar[dict[int, Callable]] = {
        **dict.fromkeys(range(256), _reject),
        **{getattr(pickle, name)[0]: pickle._Unpickler.dispatch[getattr(pickle, name)[0]] for name in _PLAIN_OPCODES},
        pickle.EMPTY_DICT[0]: lambda self: self.append(_Table()),
        pickle.EMPTY_SET[0]: lambda self: self.append(_SET),
        pickle.BYTEARRAY8[0]: pickle._Unpickler.dispatch[pickle.BINBYTES8[0]],  # does not allocate what it declares
        pickle.FROZENSET[0]: _load_frozenset,
        pickle.REDUCE[0]: _load_call,
        pickle.NEWOBJ[0]: _load_call,
        pickle.BUILD[0]: _load_state,
    }
