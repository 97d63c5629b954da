"""Save quantized files in folders that ComfyUI's loaders search."""

from collections.abc import Callable
from pathlib import Path

import folder_paths

from ...quant_core.errors import OutputError
from ...quant_core.output.together import write_together
from .folders import (
    CHECKPOINTS,
    DIFFUSION_MODELS,
    TEXT_ENCODERS,
    forget_file_list,
    place_file,
    remove_files,
    resolve_prefix,
)
from .quantizing import Quantized

__all__ = ["SAVE_FOLDERS", "check_name", "save_card", "save_files"]

# Model folder → subfolder of the output folder that ComfyUI's loaders search for such files.
_OUTPUT_SUBFOLDERS = {DIFFUSION_MODELS: "diffusion_models", CHECKPOINTS: "checkpoints", TEXT_ENCODERS: "clip"}


def _models_folder(kind: str) -> Path:
    """ComfyUI's first folder of that name."""
    paths = [Path(path) for path in folder_paths.get_folder_paths(kind)]
    return next(
        (path for path in paths if path.name == kind), paths[0]
    )  # the list also has legacy folders (unet, clip)


SAVE_FOLDERS = {
    "output": lambda kind: Path(folder_paths.get_output_directory()) / _OUTPUT_SUBFOLDERS[kind],
    "models": _models_folder,
}


def check_name(prefix: str) -> None:
    """Raise OutputError unless ``prefix`` is a file name inside the output folder."""
    resolve_prefix(Path(folder_paths.get_output_directory()), prefix)


def save_files(quantized: Quantized, prefix: str, folder: str) -> list[Path]:
    """Save each file of ``quantized`` under a new name in ``folder``, a key of SAVE_FOLDERS; returns the paths.

    Existing files are never overwritten. After an error none of the new files is left.

    Raises:
        OutputError: the prefix is not a file name inside the folder, or the folder cannot be written.
    """
    target, name = resolve_prefix(SAVE_FOLDERS[folder](quantized.kind), prefix)
    paths = []
    try:
        for part, path in quantized.files.items():
            stem = "_".join(filter(None, (name, part, quantized.label)))
            paths.append(place_file(path, target, stem, ".safetensors"))
    except BaseException:
        remove_files(paths)
        raise
    forget_file_list(quantized.kind)
    return paths


def save_card(model: Path, markdown: Callable[[str], str], image: bytes) -> list[Path]:
    """Write a quality card beside a saved model, under its name with .png and .md; returns the paths.

    ``markdown``: the text, from the name of the image.

    Raises:
        OutputError: a card cannot be written, or another file has its name. Then none of both is left; the model is complete.
    """
    picture, text = model.with_suffix(".png"), model.with_suffix(".md")
    try:
        write_together({picture: image, text: markdown(picture.name).encode()})
    except OutputError as error:
        raise OutputError(f"{error} {model} is complete and verified; only its quality card is missing.") from error
    return [picture, text]
