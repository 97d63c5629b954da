"""Errors of a command: one sentence on standard error, and an object of the JSON document."""

import argparse
import traceback

from ..display import escape_control
from ..failures import describe_error
from .streams import print_error

__all__ = ["report_error"]


def report_error(args: argparse.Namespace, error: Exception) -> dict[str, object]:
    """Print an error, with the traceback where --debug asks for it; returns :func:`describe_error` of it."""
    if hasattr(args, "debug"):
        print_error(traceback.format_exc())
    described = describe_error(error)
    print_error(f"lrq: {escape_control(str(described['message']))}")
    return described
