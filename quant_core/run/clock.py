"""Elapsed time and ETA of a run."""

import time

__all__ = ["Clock"]


class Clock:
    """Time since the start of a run, and its ETA from the bytes per second so far.

    Args:
        total: bytes of all source tensors.
    """

    def __init__(self, total: int):
        self._start = time.perf_counter()
        self._total, self._done = total, 0

    @property
    def elapsed(self) -> float:
        """Time in s since the start."""
        return time.perf_counter() - self._start

    def exclude(self, count: int) -> None:
        """Exclude bytes from the ETA: those of resumed layers took no time."""
        self._total -= count

    def advance(self, count: int) -> float:
        """Count bytes as done; returns the ETA in s."""
        self._done += count
        return self.elapsed * (self._total - self._done) / self._done if self._done else 0.0
