"""The command ``lrq``."""

from .commands import main, run
from .parser import EXIT_CODES

__all__ = ["EXIT_CODES", "main", "run"]
