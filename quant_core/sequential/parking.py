"""Memory of suspended calls: tensors of a block's arguments leave the device while their call waits, if there are too many.

Their storages are emptied in place, since the frames of the model hold them as well.
"""

import itertools
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

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


class Parking:
    """Place of the tensors of suspended calls: on the device, in main memory, then in mapped files.

    Args:
        model: its parameters, buffers and other tensors stay where they are.
        device_bytes, ram_bytes: limits of the first two places.
        folder: existing folder for the files.
    """

    def __init__(self, model: torch.nn.Module, device: torch.device, device_bytes: int, ram_bytes: int, folder: Path):
        self._model, self._device, self._folder = model, device, folder
        self._device_free, self._ram_free = device_bytes, ram_bytes
        self._on_device: dict[BlockCall, int] = {}
        self._parked: dict[BlockCall, list[tuple[torch.UntypedStorage, torch.Tensor, Path | None]]] = {}
        self._numbers = itertools.count()

    def park(self, call: BlockCall) -> None:
        """Count the tensors of a call that has been suspended, and move them away where the device is full."""
        storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage() for tensor in self._movable(call)}
        size = sum(storage.nbytes() for storage in storages.values())
        if size <= self._device_free:
            self._device_free -= size
            self._on_device[call] = size
            return
        own = {tensor.untyped_storage()._cdata for tensor in _held_tensors(self._model)}
        moved = [storage for key, storage in storages.items() if key not in own]
        self._parked[call] = [(storage, *self._copy_away(storage)) for storage in moved]
        self.leave(call)

    def restore(self, call: BlockCall) -> None:
        """Put the tensors of a call back on the device, until :meth:`leave` or :meth:`release`."""
        for storage, copy, _ in self._parked.get(call, ()):
            if storage.nbytes() == 0:
                storage.resize_(copy.numel())
                _view(storage, self._device).copy_(copy)

    def leave(self, call: BlockCall) -> None:
        """Free the device memory of a call whose tensors have not been changed."""
        for storage, _, _ in self._parked.get(call, ()):
            storage.resize_(0)

    def release(self, call: BlockCall) -> None:
        """Restore a call that goes on."""
        self.restore(call)
        self._device_free += self._on_device.pop(call, 0)
        for _, copy, path in self._parked.pop(call, ()):
            if path is None:
                self._ram_free += copy.numel()
            else:
                path.unlink(missing_ok=True)

    def _movable(self, call: BlockCall) -> Iterable[torch.Tensor]:
        return (
            tensor
            for tensor in call_tensors((call.args, call.kwargs))
            if tensor.device.type == self._device.type and tensor.untyped_storage().nbytes() >= _SMALLEST
        )

    def _copy_away(self, storage: torch.UntypedStorage) -> tuple[torch.Tensor, Path | None]:
        """The bytes of a storage in main memory, or in a file."""
        size, path = storage.nbytes(), None
        if size <= self._ram_free:
            self._ram_free -= size
            copy = torch.empty(size, dtype=torch.uint8)
        else:
            path = self._folder / f"call_{os.getpid()}_{next(self._numbers)}"
            copy = torch.from_file(str(path), shared=True, size=size, dtype=torch.uint8)
        copy.copy_(_view(storage, self._device))
        return copy, path


def _view(storage: torch.UntypedStorage, device: torch.device) -> torch.Tensor:
    """The bytes of a storage, uint8."""
    return torch.empty(0, dtype=torch.uint8, device=device).set_(storage)


def _held_tensors(model: torch.nn.Module) -> Iterator[torch.Tensor]:
    """All tensors that the modules of a model hold, also in plain attributes."""
    for module in model.modules():
        yield from call_tensors(list(vars(module).values()))
