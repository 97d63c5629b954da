"""Free space of a disk, compared with the size of a file before it is written."""

import shutil
from pathlib import Path

from ..display import human_bytes
from ..errors import OutputError

__all__ = ["check_disk_space"]


def check_disk_space(path: Path, size: int) -> None:
    """Refuse a file that the disk has no room for; a disk that does not report its free space is not checked.

    Args:
        path: of the file; its folder need not exist.
        size: bytes to write.

    Raises:
        OutputError: the disk has fewer free bytes.
    """
    folder = next((folder for folder in path.absolute().parents if folder.is_dir()), path.absolute().parent)
    try:
        free = shutil.disk_usage(folder).free
    except OSError:
        return
    if free < size:
        raise OutputError(
            f"{path} needs {human_bytes(size)}, and its disk has {human_bytes(free)} free; free some space there or choose "
            "another folder."
        )
