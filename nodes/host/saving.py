"""Quantized files to where ComfyUI's loaders look."""

from pathlib import Path

import folder_paths

from .folders import CHECKPOINTS, DIFFUSION_MODELS, TEXT_ENCODERS, destination, place, remove
from .quantizing import Quantized

__all__ = ["SAVE_FOLDERS", "check_name", "save"]


# Folder of the output that ComfyUI's loaders search, by kind.
_OUTPUT_SUBFOLDERS = {DIFFUSION_MODELS: "diffusion_models", CHECKPOINTS: "checkpoints", TEXT_ENCODERS: "clip"}


def _models_folder(kind: str) -> Path:
    paths = [Path(path) for path in folder_paths.get_folder_paths(kind)]
    return next((path for path in paths if path.name == kind), paths[0])  # older folders (unet, clip) are listed too


SAVE_FOLDERS = {
    "output": lambda kind: Path(folder_paths.get_output_directory()) / _OUTPUT_SUBFOLDERS[kind],
    "models": _models_folder,
}


def check_name(prefix: str) -> None:
    """Raises OutputError when ``prefix`` is no file name that stays inside the folder."""
    destination(Path(folder_paths.get_output_directory()), prefix)


def save(quantized: Quantized, prefix: str, folder: str) -> list[Path]:
    """Give each file of ``quantized`` a lasting name, or none; never overwrites, never leaves the folder."""
    target, name = destination(SAVE_FOLDERS[folder](quantized.kind), prefix)
    paths = []
    try:
        for part, path in quantized.files.items():
            stem = "_".join(filter(None, (name, part, quantized.label)))
            paths.append(place(path, target, stem, ".safetensors"))
    except BaseException:
        remove(paths)
        raise
    return paths
