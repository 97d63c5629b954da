"""Waiting for a thread without being deaf to the user who cancels."""

from concurrent.futures import Future, wait

from .events import CancelCheck

__all__ = ["awaited"]

_PATIENCE = 0.2  # seconds between two looks at the cancellation check


def awaited(future: Future, check: CancelCheck):
    """The future's result; ``check`` is called while waiting."""
    while not wait([future], timeout=_PATIENCE).done:
        check()
    return future.result()
