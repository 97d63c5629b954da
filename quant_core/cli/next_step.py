"""What to do with a finished file: its folder in ComfyUI, and the node that loads it."""

from collections.abc import Iterable
from pathlib import Path

from ..output import inspect_file

__all__ = ["ENCODERS", "describe_next_step"]

# Presets of text encoders.
ENCODERS = ("clip", "full_precision_text", "gemma4", "generic_text", "mistral", "qwen35", "t5xxl", "visual")
# Folder below ComfyUI/models → (its other names, node that loads its files).
_FOLDERS = {
    "diffusion_models": (("unet",), "Load Diffusion Model"),
    "text_encoders": (("clip",), "Load CLIP"),
    "checkpoints": ((), "Load Checkpoint"),
}
_MODEL_PREFIX = "model.diffusion_model."  # of the diffusion model in a checkpoint


def describe_next_step(path: Path, names: Iterable[str], preset: str) -> str:
    """Where the file ``path`` belongs, which node loads it and which ComfyUI reads it.

    Args:
        names: of the tensors of the model.
        preset: of the run.
    """
    folder = _find_folder(list(names), preset)
    others, loader = _FOLDERS[folder]
    in_place = {folder, *others} & set(path.absolute().parent.parts)
    first = "press R in ComfyUI" if in_place else f"move {path.name} to ComfyUI/models/{folder}"
    return f"Next: {first} and choose it in {loader}. {inspect_file(path).stock}"


def _find_folder(names: list[str], preset: str) -> str:
    """The folder of a whole checkpoint, of a text encoder by its preset, else that of diffusion models."""
    inside = [name.startswith(_MODEL_PREFIX) for name in names]
    if any(inside) and not all(inside):
        return "checkpoints"
    return "text_encoders" if preset in ENCODERS else "diffusion_models"
