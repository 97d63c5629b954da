"""Memory of suspended calls: tensors of a block's arguments leave the device while their call waits, if there are too many.

Their storages are emptied in place, since the frames of the model hold them as well.
"""

import itertools
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from ..errors import OutputError
from ..file_system import remove_file
from ..output.writer import write_all
from .calls import BlockCall

__all__ = ["Parking", "call_tensors"]

_SMALLEST = 1 << 20  # bytes of a tensor that is worth moving


def call_tensors(values: object) -> Iterator[torch.Tensor]:
    """All tensors in nested dicts, lists and tuples."""
    if isinstance(values, torch.Tensor):
        yield values
    elif isinstance(values, dict):
        for value in values.values():
            yield from call_tensors(value)
    elif isinstance(values, list | tuple):
        for value in values:
            yield from call_tensors(value)


@dataclass(frozen=True)
class _Parked:
    """A storage whose ``size`` bytes are elsewhere: a tensor in main memory (uint8), or a file."""

    storage: torch.UntypedStorage
    size: int
    place: torch.Tensor | Path

    def fill(self, device: torch.device) -> None:
        """Give the storage its bytes again if it is empty."""
        if self.storage.nbytes() == 0:
            copy = self.place
            if isinstance(copy, Path):
                copy = torch.from_file(str(copy), shared=False, size=self.size, dtype=torch.uint8)
            self.storage.resize_(self.size)
            _view(self.storage, device).copy_(copy)


class Parking:
    """Place of the tensors of suspended calls: on the device, in main memory, then in files.

    Args:
        model: its parameters, buffers and other tensors stay where they are.
        device_bytes, ram_bytes: limits of the first two places.
        folder: existing folder for the files.
    """

    def __init__(self, model: torch.nn.Module, device: torch.device, device_bytes: int, ram_bytes: int, folder: Path):
        self._model, self._device, self._folder = model, device, folder
        self._device_free, self._ram_free = device_bytes, ram_bytes
        self._on_device: dict[BlockCall, int] = {}
        self._parked: dict[BlockCall, dict[int, _Parked]] = {}
        self._suspended: dict[BlockCall, set[int]] = {}  # calls with the storages of their tensors
        self._numbers = itertools.count()

    def park(self, call: BlockCall) -> None:
        """Count the tensors of a call that has been suspended, and move them away where the device is full.

        Tensors that another suspended call has too stay on the device.
        """
        found = {tensor.untyped_storage()._cdata: tensor.untyped_storage() for tensor in self._device_tensors(call)}
        shared = found.keys() & set().union(*self._suspended.values())
        for other in self._parked:
            self._bring_back(other, shared)
        self._suspended[call] = set(found)
        storages = {
            key: storage
            for key, storage in found.items()
            if key not in shared and storage.nbytes() >= _SMALLEST and storage.resizable()
        }
        size = sum(storage.nbytes() for storage in storages.values())
        if size <= self._device_free:
            self._device_free -= size
            self._on_device[call] = size
            return
        own = {tensor.untyped_storage()._cdata for tensor in _held_tensors(self._model)}
        moved = {key: storage for key, storage in storages.items() if key not in own}
        self._parked[call] = {key: self._copy_away(storage) for key, storage in moved.items()}
        self.leave(call)

    def restore(self, call: BlockCall) -> None:
        """Put the tensors of a call back on the device, until :meth:`leave` or :meth:`release`."""
        for parked in self._parked.get(call, {}).values():
            parked.fill(self._device)

    def leave(self, call: BlockCall) -> None:
        """Free the device memory of a call whose tensors have not been changed."""
        for parked in self._parked.get(call, {}).values():
            parked.storage.resize_(0)

    def release(self, call: BlockCall) -> None:
        """Restore a call that goes on."""
        self._bring_back(call, self._suspended.pop(call, set()))
        self._device_free += self._on_device.pop(call, 0)
        self._parked.pop(call, None)

    def _bring_back(self, call: BlockCall, keys: Iterable[int]) -> None:
        """Let these storages of a call stay on the device."""
        parked = self._parked.get(call, {})
        for each in [parked.pop(key) for key in keys if key in parked]:
            each.fill(self._device)
            if isinstance(each.place, Path):
                remove_file(each.place)
            else:
                self._ram_free += each.size

    def _device_tensors(self, call: BlockCall) -> Iterator[torch.Tensor]:
        tensors = call_tensors((call.args, call.kwargs))
        return (tensor for tensor in tensors if tensor.device.type == self._device.type)

    def _copy_away(self, storage: torch.UntypedStorage) -> _Parked:
        """Copy the bytes of a storage to main memory, or to a file.

        Raises:
            OutputError: the file cannot be written.
        """
        size = storage.nbytes()
        copy = torch.empty(size, dtype=torch.uint8).copy_(_view(storage, self._device))
        if size <= self._ram_free:
            self._ram_free -= size
            return _Parked(storage, size, copy)
        path = self._folder / f"call_{os.getpid()}_{next(self._numbers)}"
        try:
            with open(path, "xb", buffering=0) as file:  # not mapped: a full disk would end the process with SIGBUS
                write_all(file, copy.numpy().data)
        except OSError as error:
            remove_file(path)
            raise OutputError(
                f"Tensors of recorded calls cannot be written to {self._folder}: {error.strerror or error}; free some "
                "space, or record fewer calls (replay_calls)."
            ) from error
        return _Parked(storage, size, path)


def _view(storage: torch.UntypedStorage, device: torch.device) -> torch.Tensor:
    """The bytes of a storage, uint8."""
    return torch.empty(0, dtype=torch.uint8, device=device).set_(storage)


def _held_tensors(model: torch.nn.Module) -> Iterator[torch.Tensor]:
    """All tensors that the modules of a model hold, also in plain attributes."""
    for module in model.modules():
        yield from call_tensors(list(vars(module).values()))
