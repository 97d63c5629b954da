"""Small files that belong together: all of them are written, or none."""

import contextlib
import secrets
from collections.abc import Mapping
from pathlib import Path

from ..errors import OutputError, OutputExistsError
from .durable import flush_to_disk
from .publish import flush_folder, output_error, publish_file

__all__ = ["write_together"]


def write_together(files: Mapping[Path, bytes], *, overwrite: bool = False) -> None:
    """Write new files, each complete before it gets its name; an existing file with the same content is accepted.

    ``overwrite``: replace files with other content.

    Raises:
        OutputError: a file cannot be written, or one with other content has its name. After an error no new file is left.
    """
    with contextlib.ExitStack() as cleanup:
        hidden = {path: path.with_name(f".{secrets.token_hex(4)}.partial") for path in files}
        for path, partial in hidden.items():
            try:
                with open(partial, "xb") as file:
                    cleanup.callback(partial.unlink, missing_ok=True)
                    file.write(files[path])
                    file.flush()
                    flush_to_disk(file.fileno())
            except OSError as error:
                raise output_error(error, path) from error
        with contextlib.ExitStack() as undo:
            for path, partial in hidden.items():
                if _publish(partial, path, overwrite):
                    undo.callback(path.unlink, missing_ok=True)
            for folder in {path.parent for path in files}:
                _flush(folder)
            undo.pop_all()


def _publish(partial: Path, path: Path, overwrite: bool) -> bool:
    """Give a file its name; False if a file with the same content has it."""
    try:
        return publish_file(partial, path, overwrite=overwrite)
    except OutputExistsError as error:
        raise OutputError(f"{path} exists and belongs to another file; move it, and save again.") from error
    except OSError as error:
        raise output_error(error, path) from error


def _flush(folder: Path) -> None:
    try:
        flush_folder(folder)
    except OSError as error:
        raise output_error(error, folder) from error
