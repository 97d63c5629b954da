"""Errors of a command: one sentence on standard error, and an object of the JSON document."""

import argparse
import traceback

from ..display import escape_control
from ..errors import QuantizationError
from .streams import print_error

__all__ = ["describe_error", "report_error"]


def report_error(args: argparse.Namespace, error: Exception) -> dict[str, object]:
    """Print an error, with the traceback where --debug asks for it; returns :func:`describe_error` of it."""
    if hasattr(args, "debug"):
        print_error(traceback.format_exc())
    described = describe_error(error)
    print_error(f"lrq: {escape_control(str(described['message']))}")
    return described


def describe_error(error: Exception) -> dict[str, object]:
    """Class and message of an error, and the file, tensor and option that it concerns, or None."""
    known = isinstance(error, QuantizationError)
    concerned = {name: getattr(error, name) if known else None for name in ("file", "tensor", "option")}
    return {"type": type(error).__name__, "message": str(error) if known else _describe_unexpected(error), **concerned}


def _describe_unexpected(error: Exception) -> str:
    description = " ".join(f"{type(error).__name__}: {error}".split())
    return f"unexpected error ({description}); run again with --debug for the traceback, and report it."
