"""Lines about a long task, so that a user sees that it goes on."""

import threading
import time
from collections.abc import Callable

__all__ = ["Ticker"]

_SECONDS = 3  # between two lines of the same text


class Ticker:
    """Print a text at once when it changes, and again after some seconds without a change."""

    def __init__(self, seconds: float = _SECONDS, out: Callable[[str], None] = lambda line: print(line, flush=True)):
        self._seconds, self._out, self._start = seconds, out, time.monotonic()
        self._changed, self._ended, self._text = threading.Event(), False, ""
        self._thread = threading.Thread(target=self._run, daemon=True)

    def tell(self, text: str | None) -> None:
        """Change the text; None and the same text change nothing."""
        if text is not None and text != self._text:
            self._text = text
            self._changed.set()

    def _run(self) -> None:
        while not self._ended:
            if self._text:
                self._out(f"{time.monotonic() - self._start:5.0f} s  {self._text}")
            self._changed.wait(self._seconds)
            self._changed.clear()

    def __enter__(self) -> "Ticker":
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._ended = True
        self._changed.set()
        self._thread.join()
