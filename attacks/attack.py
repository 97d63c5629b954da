"""Description of a hostile file."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

__all__ = ["CANARY", "DEEP_JSON", "Attack"]

CANARY = "executed"  # name of the file that appears if a pickle was executed
DEEP_JSON = b"[" * 100_000


@dataclass(frozen=True)
class Attack:
    """Hostile file.

    Attributes:
        file_name: its suffix selects the reader.
        content: its bytes, or a function of the folder that returns them.
        purpose: one line of README.md.
    """

    file_name: str
    content: bytes | Callable[[Path], bytes]
    purpose: str

    def write(self, folder: Path) -> Path:
        """Write the file into ``folder`` and return its path."""
        path = folder / self.file_name
        path.write_bytes(self.content(folder) if callable(self.content) else self.content)
        return path
