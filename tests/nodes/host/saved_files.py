"""Quantized files and their saved copies. Imported by tests in ComfyUI's process."""

import errno
import os
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import folder_paths

from learned_rounding.nodes import host as pack
from learned_rounding.quant_core import Recipe
from learned_rounding.tests.nodes.host.tiny_model import TINY

__all__ = ["file_names", "output", "quantize_tiny", "save_without_links"]


def output() -> Path:
    return Path(folder_paths.get_output_directory())


def quantize_tiny(
    format: str = "float8_e4m3fn", kind: str = "diffusion_models", path: Path = TINY, **options
) -> pack.Quantized:
    """A new run; the cached result is dropped."""
    pack.quantizing._last = None
    recipe = Recipe(format=format, rounding="nearest", **{"convrot": None, **options})
    return pack.quantize(pack.FileSource(path, kind, "sd3"), recipe, lambda event: None, general=True)


def file_names(folder: Path) -> list[str]:
    """Names of all files in a folder and below, sorted."""
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def save_without_links(call: Callable, links_within: Path | None = None):
    """Run ``call`` without hard links, or with hard links only inside ``links_within``, as between two disks."""
    link = os.link

    def refuse(path, target):
        if links_within is None or links_within not in Path(path).parents:
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
        link(path, target)

    with patch.object(os, "link", refuse):
        return call()
