"""Lines on standard output and standard error. A stream that fails does not stop the command."""

import contextlib
import errno
import os
import stat
import sys

from ..display import escape_control

__all__ = ["flush_output", "prepare_streams", "print_error", "print_line"]

_CLOSED = (errno.EIO, errno.EBADF)  # errors of a terminal that was closed
_failures: list[OSError] = []  # of standard output, since prepare_streams


def prepare_streams() -> None:
    """Replace closed streams by the null device, and escape characters that the encoding of a stream lacks."""
    _failures.clear()
    for name in ("stdin", "stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # otherwise a file of the run could get its descriptor
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w", encoding="utf-8"))
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def print_line(text: object) -> None:
    """Print to standard output, control characters escaped; :func:`flush_output` reports a failure.

    Raises:
        BrokenPipeError: standard output is a pipe without a reader.
    """
    with _record_failure():
        print(escape_control(str(text), allowed="\n"))


def print_error(text: str) -> None:
    """Print to standard error, control characters escaped; a failure has no other stream to be reported on."""
    with contextlib.suppress(OSError):
        print(escape_control(text, allowed="\n"), file=sys.stderr, flush=True)


def flush_output() -> OSError | None:
    """Write what standard output has buffered; returns the error if output is lost, None for a closed terminal.

    Raises:
        BrokenPipeError: standard output is a pipe without a reader.
    """
    with _record_failure():
        sys.stdout.flush()
    if not _failures:
        return None
    regular = stat.S_ISREG(os.fstat(sys.stdout.fileno()).st_mode)
    return None if _failures[0].errno in _CLOSED and not regular else _failures[0]


@contextlib.contextmanager
def _record_failure():
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        _failures.append(error)
