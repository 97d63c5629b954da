"""docs/models.md: what becomes of every model ComfyUI knows, from the tensor lists and the presets.

    python tests/architectures/table.py      writes it again
"""

import argparse
import math
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch

from learned_rounding.quant_core.checkpoints import TensorInfo
from learned_rounding.quant_core.errors import NothingToQuantizeError
from learned_rounding.quant_core.recipes import make_plan, recognise
from learned_rounding.tests.architectures.lists import architectures, read, title

__all__ = ["DOCUMENT", "Found", "document", "examine"]

DOCUMENT = Path(__file__).parents[2] / "docs" / "models.md"
HEAD = """# Models

What becomes of the models that ComfyUI knows when nothing but a format is chosen, from their true tensors (built from ComfyUI's own classes,
`tests/architectures/lists`) and the presets. Written by `python tests/architectures/table.py`; a test compares.

*quantized* is the share of the parameters in quantized layers; every format of `lrq formats` takes all of these layers, per tensor and per
row. *ConvRot 256* is the share of the layers that rotate in groups of 256 (others take 64 or 16), *blocks of 128* that of layers which whole
blocks cover (others have smaller blocks at their edge). *size* is that of the INT8 or FP8 file, its kept part in 16 bits. Any other model
gets the general rule alone, and the plan says so.

| model | preset | parameters | quantized | layers | ConvRot 256 | blocks of 128 | size |
| --- | --- | --- | --- | --- | --- | --- | --- |
"""


class Found(NamedTuple):
    """What the plan of a model is.

    Attributes:
        preset: name of the preset that recognises it, or None.
        parameters: of the whole model.
        quantized: shapes of the layers to quantize, by tensor name.
        sure: the preset knows every one of them.
    """

    preset: str | None
    parameters: int
    quantized: dict[str, tuple[int, ...]]
    sure: bool

    @property
    def share(self) -> float:
        """Parameters in quantized layers / all parameters."""
        return sum(map(math.prod, self.quantized.values())) / self.parameters

    def fitting(self, step: int, sides: slice = slice(None)) -> float:
        """Share of the quantized layers whose sides (out, in) are multiples of ``step``."""
        return sum(all(side % step == 0 for side in shape[sides]) for shape in self.quantized.values()) / len(self.quantized)


def source(name: str) -> SimpleNamespace:
    """The header of a bfloat16 file of that model."""
    infos = {tensor: TensorInfo(torch.bfloat16, entry.shape) for tensor, entry in read(name).items()}
    return SimpleNamespace(name=name, tensors=infos, metadata={})


def examine(name: str) -> Found:
    """The plan of the model of that list, with nothing but detection."""
    header = source(name)
    parameters = sum(math.prod(info.shape) for info in header.tensors.values())
    preset = recognise(header.tensors)
    try:
        plan = make_plan(header)
    except NothingToQuantizeError:
        return Found(preset and preset.name, parameters, {}, True)
    layers = {tensor: header.tensors[tensor].shape for tensor in plan.names("quantize")}
    sure = preset is not None and all(preset.blocks.search(tensor) for tensor in layers)
    return Found(preset and preset.name, parameters, layers, sure)


def _row(name: str) -> str:
    found = examine(name)
    cells = [title(name), found.preset or "general rule", f"{found.parameters / 1e9:.2f} B"]
    if found.quantized:
        size = found.parameters * (2 - found.share) / 1e9
        shares = (found.fitting(256, slice(1, 2)), found.fitting(128))
        cells += [f"{found.share:.1%}", str(len(found.quantized)), *(f"{share:.0%}" for share in shares), f"{size:.1f} GB"]
    else:
        cells += ["none: ComfyUI reads it in full precision only", "0", "–", "–", f"{found.parameters * 2 / 1e9:.1f} GB"]
    return f"| {' | '.join(cells)} |\n"


def document() -> str:
    """The whole document."""
    return HEAD + "".join(map(_row, sorted(architectures(), key=lambda name: title(name).lower())))


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    DOCUMENT.write_text(document(), encoding="utf-8")
