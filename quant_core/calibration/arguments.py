"""Arguments of a model's call as JSON values and tensors.

A node is None, a bool, int, float or str, or a list ``[kind, ...]``:

=====================================  ==================================================================
node                                   value
=====================================  ==================================================================
``["list", node, ...]``                list; ``tuple`` and ``dict`` likewise, the entries of a dict are
                                       ``[node of the key, node]``
``["tensor", number]``                 tensor ``number`` of the call
``["device", on_host]``                device of the model, or the CPU if ``on_host``
``["live"]``                           object that is not stored: a callable, a patch, a patcher
``["bytes", hex]`` and others          see ``_PLAIN``
=====================================  ==================================================================
"""

import uuid
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch

__all__ = ["ArgumentEncoder", "Node", "Path", "decode_arguments", "find_live_object"]

Node = None | bool | int | float | str | list[Any]
Path = tuple[Any, ...]

_SCALARS = (type(None), bool, int, float, str)
_TENSORS = (torch.Tensor, torch.nn.Parameter)
_CPU = torch.device("cpu")
_MAX_DEPTH = 50  # of nested containers; deeper ones, which may contain themselves, are not stored
_DTYPES = {str(value): value for value in vars(torch).values() if isinstance(value, torch.dtype)}
# Kind → (type, value as JSON, value of the JSON), for immutable values without tensors.
_PLAIN: dict[str, tuple[type, Callable[[Any], Any], Callable[[Any], Any]]] = {
    "bytes": (bytes, bytes.hex, bytes.fromhex),
    "dtype": (torch.dtype, str, _DTYPES.__getitem__),
    "size": (torch.Size, list, torch.Size),
    "uuid": (uuid.UUID, str, uuid.UUID),
}
_PLAIN_KINDS = {of_type: kind for kind, (of_type, _, _) in _PLAIN.items()}
_SEQUENCES: dict[str, type] = {"list": list, "tuple": tuple}
_SEQUENCE_KINDS = {of_type: kind for kind, of_type in _SEQUENCES.items()}


class ArgumentEncoder:
    """Encode the arguments of one call and collect its tensors, each object once.

    Args:
        ignored: paths, such as ``("options", "callbacks")``, of dict entries that are left out.

    Attributes:
        tensors: distinct tensors of the call, in the order of their numbers.
    """

    def __init__(self, ignored: Collection[Path] = ()):
        self._ignored = frozenset(ignored)
        self._numbers: dict[int, int] = {}  # id of a tensor → its number
        self.tensors: list[torch.Tensor] = []

    def on_host(self, device: torch.device) -> bool:
        """Whether ``device`` is the CPU, but the first tensor of the call is on another device."""
        return device.type == "cpu" and bool(self.tensors) and self.tensors[0].device.type != "cpu"

    def encode(self, value: object, path: Path = ()) -> Node:
        """Return the node of ``value``; ``path``: keys and indices that lead to it."""
        if type(value) in _SCALARS:
            return value  # type: ignore[return-value]
        if type(value) in _TENSORS:
            return self._encode_tensor(value)  # type: ignore[arg-type]
        if len(path) < _MAX_DEPTH:
            if kind := _SEQUENCE_KINDS.get(type(value)):
                items = enumerate(value)  # type: ignore[arg-type]
                return [kind, *(self.encode(item, (*path, index)) for index, item in items)]
            if type(value) is dict and all(map(_is_plain, value)):
                entries = [(key, item) for key, item in value.items() if (*path, key) not in self._ignored]
                return ["dict", *([self.encode(key), self.encode(item, (*path, key))] for key, item in entries)]
        if isinstance(value, torch.device):
            return ["device", self.on_host(value)]
        if kind := _PLAIN_KINDS.get(type(value)):
            return [kind, _PLAIN[kind][1](value)]
        return ["live"]

    def _encode_tensor(self, tensor: torch.Tensor) -> Node:
        if tensor.layout is not torch.strided or tensor.is_meta or tensor.is_quantized:
            return ["live"]
        if id(tensor) not in self._numbers:
            self._numbers[id(tensor)] = len(self.tensors)
            self.tensors.append(tensor)
        return ["tensor", self._numbers[id(tensor)]]


def _is_plain(key: object) -> bool:
    """Whether a key of a dict is a scalar, or a tuple of plain keys such as ``("double_block", 3)``."""
    return type(key) in _SCALARS or (type(key) is tuple and all(map(_is_plain, key)))


def decode_arguments(
    node: Any, tensors: Sequence[Any], device: torch.device, find_live: Callable[[Path], object], path: Path = ()
) -> Any:
    """Return the value of a node, in new containers.

    Args:
        tensors: tensors of the call by number.
        device: device of the model.
        find_live: path → object that is not stored.

    Raises:
        ValueError, TypeError, LookupError, RecursionError: the node is not valid.
    """
    if type(node) in _SCALARS:
        return node

    def decode(inner: Any, key: Any) -> Any:
        return decode_arguments(inner, tensors, device, find_live, (*path, key))

    kind, *items = node
    if kind in _SEQUENCES:
        return _SEQUENCES[kind](decode(item, index) for index, item in enumerate(items))
    if kind == "dict":
        keys = [decode_arguments(key, (), device, _refuse_live_key) for key, _ in items]
        return {key: decode(item, key) for key, (_, item) in zip(keys, items, strict=True)}
    if kind == "live":
        return find_live(path)
    (item,) = items
    if kind == "tensor":
        return tensors[range(len(tensors))[item]]
    if kind == "device":
        return _CPU if item else device
    return _PLAIN[kind][2](item)


def _refuse_live_key(path: Path) -> object:
    raise ValueError("an object that is not stored is a key of a dict")


def find_live_object(live: Mapping[str, object], path: Path) -> Any:
    """Return the object at ``path`` in nested dicts, lists and tuples. Raises LookupError if there is none."""
    value: Any = live
    for key in path:
        if not isinstance(value, (Mapping, list, tuple)):
            raise KeyError(key)
        value = value[key]  # type: ignore[index]
    return value
