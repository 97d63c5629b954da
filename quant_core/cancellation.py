"""Cancellation: the check that long work calls, and waiting for a thread without blocking it."""

from collections.abc import Callable
from concurrent.futures import Future, wait

__all__ = ["CancelCheck", "wait_for"]

CancelCheck = Callable[[], None]
"""Called often during a run; raise in it to cancel."""

_POLL = 0.2  # seconds between two calls of the cancellation check


def wait_for(future: Future, check: CancelCheck):
    """Return the result of ``future``; call ``check`` while waiting."""
    while not wait([future], timeout=_POLL).done:
        check()
    return future.result()
