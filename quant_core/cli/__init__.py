"""The command ``lrq``."""

from .commands import EXIT_CODES, main, run

__all__ = ["EXIT_CODES", "main", "run"]
