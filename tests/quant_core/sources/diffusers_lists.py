"""Tensor lists of diffusers' own classes (``diffusers/*.txt``), as tests/architectures/lists are those of ComfyUI's classes."""

from pathlib import Path

from ...architectures.lists import expand

__all__ = ["DIFFUSERS_LISTS", "read_diffusers"]

_FOLDER = Path(__file__).parent / "diffusers"
DIFFUSERS_LISTS = sorted(path.stem for path in _FOLDER.glob("*.txt"))


def read_diffusers(name: str) -> dict[str, tuple[int, ...]]:
    """Tensor name → shape. The first line of a list names the class and its options."""
    lines = (_FOLDER / f"{name}.txt").read_text(encoding="utf-8").splitlines()[1:]
    return {key: tensor.shape for key, tensor in expand(lines)}
