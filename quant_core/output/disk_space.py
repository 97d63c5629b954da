"""Free space of a disk, compared with the size of a file before it is written."""

import shutil
from pathlib import Path

from ..display import human_bytes
from ..errors import OutputError

__all__ = ["check_disk_space", "find_disk"]


def check_disk_space(path: Path, size: int) -> None:
    """Refuse a file that the disk has no room for; a disk that does not report its free space is not checked.

    Args:
        path: of the file; its folder need not exist.
        size: bytes to write.

    Raises:
        OutputError: the disk has fewer free bytes.
    """
    folder = _existing_folder(path)
    try:
        free = shutil.disk_usage(folder).free
    except OSError:
        return
    if free < size:
        raise OutputError(
            f"{path} needs {human_bytes(size)}, and its disk has {human_bytes(free)} free; free some space there or choose "
            "another folder."
        )


def find_disk(path: Path) -> int:
    """A number of the disk of a file, whose folder need not exist; 0 where it cannot be found out."""
    try:
        return _existing_folder(path).stat().st_dev
    except OSError:
        return 0


def _existing_folder(path: Path) -> Path:
    return next((folder for folder in path.absolute().parents if folder.is_dir()), path.absolute().parent)
