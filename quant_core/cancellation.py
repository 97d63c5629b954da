"""Cancellation: the check that long operations call, and waiting for a thread while calling it."""

from collections.abc import Callable, Collection
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import TypeVar

__all__ = ["CancelCheck", "wait_for", "wait_for_any"]

CancelCheck = Callable[[], None]
"""Called often during a run; raise in it to cancel."""

_POLL = 0.2  # s between two calls of the cancellation check
_T = TypeVar("_T")


def wait_for(future: "Future[_T]", check: CancelCheck) -> _T:
    """Return the result of ``future``; call ``check`` while waiting."""
    while not wait([future], timeout=_POLL).done:
        check()
    return future.result()


def wait_for_any(futures: "Collection[Future]", check: CancelCheck) -> None:
    """Wait until one of the futures is done; call ``check`` while waiting."""
    while not wait(futures, timeout=_POLL, return_when=FIRST_COMPLETED).done:
        check()
