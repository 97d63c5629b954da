"""Messages between a run and its worker processes: pickled objects, with the bytes of tensors as they are in memory."""

import io
import pickle
import traceback
from typing import IO, Any

import torch

__all__ = ["Packed", "RemoteTraceback", "pack", "pack_error", "read_message", "unpack", "write_message"]

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


def write_message(file: IO[bytes], message: Any) -> None:
    """Write one message. Raises OSError if the other process has ended."""
    _Pickler(file, protocol=5).dump(message)
    file.flush()


def read_message(file: IO[bytes]) -> Any:
    """Read the next message. Raises EOFError if the other process has ended, also in the middle of a message."""
    try:
        return pickle.load(file)
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
