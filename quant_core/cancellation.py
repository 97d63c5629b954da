"""Cancellation: the check that long operations call, and waiting for a thread while calling it."""

from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import TypeVar

__all__ = ["CancelCheck", "wait_for"]

CancelCheck = Callable[[], None]
"""Called often during a run; raise in it to cancel."""

_POLL = 0.2  # s between two calls of the cancellation check
_T = TypeVar("_T")


def wait_for(future: "Future[_T]", check: CancelCheck) -> _T:
    """Return the result of ``future``; call ``check`` while waiting."""
    while not wait([future], timeout=_POLL).done:
        check()
    return future.result()
