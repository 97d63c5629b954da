"""What is printed: text that no terminal takes for orders, by streams whose end is not that of the work."""

import errno
import os
import stat
from typing import TextIO

from ..display import escape_unprintable

__all__ = ["Printed"]

_GONE = (errno.EIO, errno.EBADF)  # what is said of a terminal that was closed


class Printed:
    """A stream of text, for ``sys.stdout`` or ``sys.stderr``. When it fails nothing more is written, and who prints goes on.

    Args:
        stream: where the text goes; None, as Python has it where the stream was closed, for nowhere.
        allowed: see :func:`escape_unprintable`.
        raises: failures that do end the work.
    """

    def __init__(self, stream: TextIO | None, allowed: str = "\n", raises: tuple[type[OSError], ...] = ()):
        self._stream = stream or open(
            os.devnull, "w", encoding="utf-8"
        )  # which also keeps its number from the files of the work
        self._allowed, self._raises = allowed, raises
        self._error: OSError | None = None

    def write(self, text: str) -> int:
        """As a stream's."""
        self._try(self._stream.write, escape_unprintable(text, self._allowed))
        return len(text)

    def flush(self) -> None:
        """As a stream's."""
        self._try(self._stream.flush)

    def _try(self, call, *args) -> None:
        if self._error is None:
            try:
                call(*args)
            except self._raises:
                raise
            except OSError as error:
                self._error = error

    @property
    def failure(self) -> OSError | None:
        """Why text was lost; None where none was, or only its reader is gone."""
        if (
            self._error is not None
            and self._error.errno in _GONE
            and not stat.S_ISREG(os.fstat(self._stream.fileno()).st_mode)
        ):
            return None
        return self._error

    def __getattr__(self, name: str):
        return getattr(self._stream, name)
