"""Messages between a run and its worker processes: pickled objects, with the bytes of tensors as they are in memory.

Tensors are in memory that both processes share, where there is such memory, else in the pipe with the rest of a message.
"""

import io
import pickle
import traceback
from collections.abc import Sequence
from typing import IO, Any

import torch

from ..sources.recycled import RecycledMemory
from .shared_memory import SharedMemory

__all__ = ["Packed", "RemoteTraceback", "pack", "pack_error", "read_message", "unpack", "write_message"]

_ALIGNMENT = 64  # bytes, of tensors in shared memory

Packed = tuple[bytes, list[Any]]
"""An object, pickled, and arrays of the bytes of its tensors, which Ray places in its object store without a copy."""


class _Pickler(pickle.Pickler):
    """Pickles tensors as their bytes, those on the CPU without a copy; others become tensors on the CPU."""

    def reducer_override(self, value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return NotImplemented
        data = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
        return _restore_tensor, (pickle.PickleBuffer(data), value.dtype, tuple(value.shape))


def _restore_tensor(data: bytearray, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    if not data:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(data, dtype=torch.uint8).view(dtype).reshape(shape)


class _SharingPickler(pickle.Pickler):
    """Pickles tensors as their place in shared memory.

    Attributes:
        tensors: (first byte, tensor).
        size: bytes of all.
    """

    def __init__(self, file: IO[bytes]):
        super().__init__(file, protocol=5)
        self.tensors: list[tuple[int, torch.Tensor]] = []
        self.size = 0

    def persistent_id(self, value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return None
        begin = self.size
        self.tensors.append((begin, value.detach()))
        self.size += -(-value.nbytes // _ALIGNMENT) * _ALIGNMENT
        return begin, value.dtype, tuple(value.shape)


class _SharingUnpickler(pickle.Unpickler):
    """Makes the tensors of a :class:`_SharingPickler`."""

    def __init__(self, file: IO[bytes], memory: SharedMemory | None, copies: RecycledMemory | None):
        super().__init__(file)
        self._memory, self._copies = memory, copies

    def persistent_load(self, pid: Any) -> torch.Tensor:
        assert self._memory is not None
        tensor = self._memory.tensor(*pid)
        return tensor if self._copies is None else self._copies.copy(tensor)


def write_message(file: IO[bytes], message: Any, slot: int | None = None, memory: SharedMemory | None = None) -> None:
    """Write one message. Raises OSError if the other process has ended.

    Args:
        slot: number of ``memory`` in the other process.
        memory: where tensors are written, over those of the message before; None: they are in the pipe.
    """
    shared = None if memory is None else _share_tensors(message, memory)
    if shared is None:
        pickle.dump((None, 0), file)
        _Pickler(file, protocol=5).dump(message)
    else:
        size, content = shared
        pickle.dump((slot, size), file)
        file.write(content)
    file.flush()


def _share_tensors(message: Any, memory: SharedMemory) -> tuple[int, bytes] | None:
    """Write the tensors of a message to shared memory; returns their size and the pickled rest, None without memory."""
    content = io.BytesIO()
    pickler = _SharingPickler(content)
    pickler.dump(message)
    try:
        memory.reserve(pickler.size)
    except OSError:
        return None
    for begin, tensor in pickler.tensors:
        memory.tensor(begin, tensor.dtype, tuple(tensor.shape)).copy_(tensor)
    return pickler.size, content.getvalue()


def read_message(file: IO[bytes], memories: Sequence[SharedMemory] = (), copies: RecycledMemory | None = None) -> Any:
    """Read the next message. Raises EOFError if the other process has ended, also in the middle of a message.

    Args:
        memories: shared memory of each slot.
        copies: where tensors are copied to; None: they are valid until the next message with the same slot.
    """
    try:
        slot, size = pickle.load(file)
        memory = None if slot is None else memories[slot]
        if memory is not None:
            memory.reserve(size)
        return _SharingUnpickler(file, memory, copies).load()
    except pickle.UnpicklingError as error:
        raise EOFError(f"a message ended early: {error}") from error


def pack(value: Any) -> Packed:
    """Pickle an object for :func:`unpack`."""
    file, buffers = io.BytesIO(), []
    _Pickler(file, protocol=5, buffer_callback=buffers.append).dump(value)
    return file.getvalue(), [_make_array(buffer.raw()) for buffer in buffers]


def unpack(packed: Packed) -> Any:
    """The object; its tensors are copies, which may be written to."""
    data, buffers = packed
    return pickle.loads(data, buffers=[bytearray(buffer) for buffer in buffers])


def _make_array(data: memoryview) -> Any:
    """An array of NumPy, the kind of buffer that Ray places in shared memory."""
    return torch.frombuffer(data, dtype=torch.uint8).numpy() if len(data) else torch.empty(0, dtype=torch.uint8).numpy()


class RemoteTraceback(Exception):
    """Traceback of an error in another process, as the cause of that error."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


def pack_error(error: Exception) -> tuple[Exception, str]:
    """The error, or one with its text where it cannot be pickled, and its traceback as text."""
    trace = "".join(traceback.format_exception(type(error), error, error.__traceback__))
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        error = RuntimeError(f"{type(error).__name__}: {error}")
    return error, trace
