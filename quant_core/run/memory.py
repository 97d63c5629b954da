"""Out-of-memory errors of torch, CUDA and Python as one error."""

import contextlib
from collections.abc import Iterator, Sequence

import torch

from ..errors import OutOfMemoryError

__all__ = ["explain_layer_memory", "explain_out_of_memory"]

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


def explain_layer_memory(
    device: torch.device, layer: str, shape: Sequence[int]
) -> contextlib.AbstractContextManager[None]:
    """:func:`explain_out_of_memory` for the weight of a layer."""
    sides = "×".join(map(str, shape))
    return explain_out_of_memory(f"{device} has too little memory for layer {layer}, {sides}")
