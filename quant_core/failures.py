"""Errors as plain data, for JSON documents and reports."""

from .errors import QuantizationError

__all__ = ["describe_error"]


def describe_error(error: BaseException) -> dict[str, object]:
    """Class and message of an error, and the file, tensor and option that it concerns, or None."""
    known = isinstance(error, QuantizationError)
    concerned = {name: getattr(error, name) if known else None for name in ("file", "tensor", "option")}
    return {"type": type(error).__name__, "message": str(error) if known else _describe_unexpected(error), **concerned}


def _describe_unexpected(error: BaseException) -> str:
    description = " ".join(f"{type(error).__name__}: {error}".split())
    return f"unexpected error ({description}); run again with --debug for the traceback, and report it."
