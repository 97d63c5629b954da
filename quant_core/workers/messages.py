"""Messages between a run and its worker processes: pickled objects, with the bytes of tensors as they are in memory."""

import pickle
import traceback
from typing import IO, Any

import torch

__all__ = ["Pickler", "RemoteTraceback", "pack_error", "read_message", "write_message"]


class Pickler(pickle.Pickler):
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
    Pickler(file, protocol=5).dump(message)
    file.flush()


def read_message(file: IO[bytes]) -> Any:
    """Read the next message. Raises EOFError if the other process has ended, also in the middle of a message."""
    try:
        return pickle.load(file)
    except pickle.UnpicklingError as error:
        raise EOFError(f"a message ended early: {error}") from error


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
