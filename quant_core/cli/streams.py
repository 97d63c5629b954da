"""Lines on standard output and standard error. A stream that fails does not stop the command."""

import errno
import os
import stat
import sys

from ..display import escape_control

__all__ = ["flush_output", "prepare_streams", "print_error", "print_line"]

_CLOSED = (errno.EIO, errno.EBADF)  # errors of a terminal that was closed


def prepare_streams() -> None:
    """Replace closed streams by the null device, and escape characters that the encoding of a stream lacks."""
    for name in ("stdin", "stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # otherwise a file of the run could get its descriptor
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w", encoding="utf-8"))
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def print_line(text: object) -> None:
    """Print to standard output, control characters escaped. Only a reader that has gone away raises.

    Raises:
        BrokenPipeError: standard output is a pipe without a reader.
    """
    try:
        print(escape_control(str(text), allowed="\n"))
    except BrokenPipeError:
        raise
    except OSError:
        pass  # the text stays in the buffer: flush_output reports the error


def print_error(text: str) -> None:
    """Print to standard error, control characters escaped."""
    try:
        print(escape_control(text, allowed="\n"), file=sys.stderr, flush=True)
    except OSError:
        pass  # there is no other stream to report it on


def flush_output() -> OSError | None:
    """Write what standard output has buffered; returns the error if it is lost, None for a closed terminal.

    Raises:
        BrokenPipeError: standard output is a pipe without a reader.
    """
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        regular = stat.S_ISREG(os.fstat(sys.stdout.fileno()).st_mode)
        return None if error.errno in _CLOSED and not regular else error
    return None
