"""Entry point of the command ``lrq``. Its help and version need no other package, not even torch."""

import contextlib
import errno
import os
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

__all__ = ["run"]

_CORE = Path(__file__).resolve().parent / "quant_core"
_HELP = _CORE / "cli" / "help"  # one page for each command, written by tests/help_pages.py


def run() -> NoReturn:
    """The process ``lrq``."""
    text = find_text(sys.argv[1:])
    if text is not None:
        os._exit(print_text(text))
    try:
        from .quant_core.cli import run as run_command
    except (ImportError, OSError) as error:  # OSError: a library of torch is missing
        sys.exit(f"lrq: {describe_import(error)}")
    run_command()


def find_text(words: Sequence[str]) -> str | None:
    """The help page or version that a command line asks for; None for any other command line."""
    command = "lrq"
    for word in words:
        if word in ("-h", "--help"):
            page = _HELP / f"{command}.txt"
            return page.read_text(encoding="utf-8") if page.is_file() else None
        if word == "--version" and command == "lrq":
            return f"lrq {runpy.run_path(str(_CORE / 'version.py'))['VERSION']}\n"
        if command == "lrq" and not word.startswith("-"):
            command = word
    return None


def print_text(text: str) -> int:
    """Print to standard output; returns the exit code, 141 for a pipe without a reader."""
    with contextlib.suppress(AttributeError):  # standard output is closed
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        print(text, end="", flush=True)
    except OSError as error:  # EINVAL is that of Windows
        if error.errno not in (errno.EPIPE, errno.EINVAL):
            raise
        return 141
    return 0


def describe_import(error: ImportError | OSError) -> str:
    """What is missing in this Python, and what to do; one sentence."""
    name = (getattr(error, "name", None) or "").partition(".")[0]
    if name == "torch":
        return (
            f"PyTorch is not installed in {sys.executable}, and every command needs it; install it (https://pytorch.org), "
            "or run lrq with the Python of ComfyUI."
        )
    if isinstance(error, ModuleNotFoundError) and name:
        return f"The package {name} is not installed in {sys.executable}; install it with pip install {name}."
    reason = " ".join(str(error).split())
    return f"{sys.executable} cannot load a package that lrq needs ({reason}); install PyTorch again."
