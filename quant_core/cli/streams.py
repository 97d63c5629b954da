"""Lines on standard output and standard error. A stream that fails does not stop the command."""

import contextlib
import errno
import json
import os
import stat
import sys

from ..display import escape_control, shorten

__all__ = ["flush_output", "prepare_streams", "print_error", "print_json", "print_line", "send_lines"]

_CLOSED = (errno.EIO, errno.EBADF)  # errors of a terminal that was closed
_failures: list[OSError] = []  # of standard output, since prepare_streams
_MOST = 32_000_000  # characters that a command prints: names in a file can be long and many
_room = _MOST
_lines_to = "stdout"  # or "stderr", where standard output gets a JSON document


def prepare_streams() -> None:
    """Replace closed streams by the null device, and escape characters that the encoding of a stream lacks."""
    global _room
    _room = _MOST
    _failures.clear()
    for name in ("stdin", "stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # otherwise a file of the run could get its descriptor
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w", encoding="utf-8"))
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def send_lines(stream: str) -> None:
    """Choose where :func:`print_line` prints: "stdout" or "stderr"."""
    global _lines_to
    _lines_to = stream


def print_json(value: object) -> None:
    """Print a value as one line of ASCII to standard output.

    Raises:
        BrokenPipeError: standard output is a pipe without a reader.
    """
    with _record_failure():
        print(json.dumps(value, allow_nan=False))


def print_line(text: object) -> None:
    """Print to standard output, or where :func:`send_lines` says, control characters escaped.

    :func:`flush_output` reports a failure of standard output.

    Raises:
        BrokenPipeError: standard output is a pipe without a reader.
    """
    if _lines_to == "stderr":
        print_error(str(text))
        return
    printed = _bound(str(text))
    if printed is not None:
        with _record_failure():
            print(printed)


def print_error(text: str) -> None:
    """Print to standard error, control characters escaped; a failure has no other stream to be reported on."""
    printed = _bound(text)
    if printed is not None:
        with contextlib.suppress(OSError):
            print(printed, file=sys.stderr, flush=True)


def _bound(text: str) -> str | None:
    """What to print of a text: control characters are escaped, long lines shortened; None beyond the bound of a command."""
    global _room
    before, lines = _room, "\n".join(shorten(escape_control(shorten(line))) for line in text.split("\n"))
    _room -= len(lines) + 1
    if _room >= 0:
        return lines
    return f"… the rest of more than {_MOST:,} characters is left out." if before >= 0 else None


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
        if error.errno == errno.EINVAL and stat.S_ISFIFO(os.fstat(sys.stdout.fileno()).st_mode):
            raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE)) from error  # how Windows reports it
        _failures.append(error)
