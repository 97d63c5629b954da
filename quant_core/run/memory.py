"""Out-of-memory errors of torch, CUDA and Python as one error."""

import contextlib
from collections.abc import Iterator

import torch

from ..errors import OutOfMemoryError

__all__ = ["explain_out_of_memory"]

_MESSAGES = ("out of memory", "can't allocate memory", "not enough memory", "ALLOC_FAILED")  # of plain RuntimeErrors


@contextlib.contextmanager
def explain_out_of_memory(problem: str) -> Iterator[None]:
    """Raise :class:`OutOfMemoryError` with a message that begins with ``problem`` if memory runs out inside."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and not any(
            message in str(error) for message in _MESSAGES
        ):
            raise
        raise OutOfMemoryError(
            f"{problem}; close other programs and models, or choose another device or a lighter rounding."
        ) from error
