"""Inputs that choose a file."""

from collections.abc import Callable, Sequence

from comfy_api.latest import io

from ...quant_core.errors import SourceError
from .schema import check_inputs, widget

__all__ = ["NO_FILE", "check_file", "file_input"]

NO_FILE = "no file found"  # the only choice where there are no files: an empty list looks like a defect


def file_input(id: str, files: Sequence[str], tooltip: str):
    """The widget that chooses one of ``files``."""
    return widget(io.Combo, id=id, options=[*files] or [NO_FILE], tooltip=tooltip)


def check_file(check: Callable[[str], object], file: str | None, advice: str) -> bool | str:
    """Result of ``validate_inputs``: see :func:`~.schema.check_inputs`; ``advice``: how to get a file where there is none."""

    def check_choice(file: str) -> None:
        if file == NO_FILE:
            raise SourceError(f"No file found; {advice}, then refresh the lists of ComfyUI (R).")
        check(file)

    return check_inputs(check_choice, file)
