"""Reads at a position of an open file, in any thread."""

import io
import os
import threading
from collections.abc import Callable

__all__ = ["positional_reader"]

_PARALLEL = hasattr(os, "preadv")  # Windows has no read at a given position


def positional_reader(file: io.FileIO | io.BytesIO) -> Callable[[memoryview, int], int]:
    """One read of the system: (view, position in the file) → number of bytes read, 0 at the end of the file.

    Where the system or the file has no read at a position, threads take turns, and the position of the file moves.
    """
    if _PARALLEL and isinstance(file, io.FileIO):
        return lambda view, position: os.preadv(file.fileno(), [view], position)
    lock = threading.Lock()

    def read_at(view: memoryview, position: int) -> int:
        with lock:
            file.seek(position)
            return file.readinto(view) or 0

    return read_at
