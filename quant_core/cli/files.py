"""Check of the files that options name, before any work: devices, pipes and sockets are refused without opening them."""

import argparse
from collections.abc import Iterable, Iterator
from pathlib import Path

from ..errors import CalibrationError, QuantizationError, RecipeError, SourceError
from ..file_system import FOLDER, find_special_kind
from ..output import final_path
from .parser import is_folder
from .recipe import layer_config_file

__all__ = ["check_files"]

# Attribute of the parsed options → what it names, the error for another kind of file, and whether it may be a folder.
_INPUTS: dict[str, tuple[str, type[QuantizationError], bool]] = {
    "input": ("source", SourceError, True),
    "inputs": ("source", SourceError, True),
    "file": ("source", SourceError, True),
    "calibration": ("calibration", CalibrationError, False),
    "recipe": ("recipe", RecipeError, False),
    "plan": ("plan", RecipeError, False),
    "layer_config": ("layer config", RecipeError, False),
    "add": ("file of measurements", QuantizationError, False),
}
_OUTPUTS = ("output", "report")


def check_files(args: argparse.Namespace) -> None:
    """Refuse a file of the options that is not a regular file; one that does not exist is reported when it is opened.

    Raises:
        QuantizationError: of the class of what the option names.
    """
    for option, path in _named_files(args, _INPUTS):
        what, error, folder = _INPUTS[option]
        kind = find_special_kind(path)
        if kind is not None and not (folder and kind == FOLDER):
            raise error(f"The {what} {path} is {kind}; give a regular file.", file=str(path), option=option)
    for option, path in _named_files(args, _OUTPUTS):
        if not (option == "output" and hasattr(args, "inputs") and is_folder(str(path))):
            final_path(path)


def _named_files(args: argparse.Namespace, options: Iterable[str]) -> Iterator[tuple[str, Path]]:
    for option in options:
        named = layer_config_file(args) if option == "layer_config" else getattr(args, option, None)
        for path in named if isinstance(named, list) else [named]:
            if path is not None:
                yield option, Path(path)
