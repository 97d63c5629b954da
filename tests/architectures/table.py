"""docs/models.md: what becomes of every model ComfyUI knows, from the tensor lists and the presets.

python tests/architectures/table.py      writes it again
"""

import argparse
import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from types import SimpleNamespace

import torch

from learned_rounding.quant_core import FORMATS, PRESETS, Recipe
from learned_rounding.quant_core.errors import NothingToQuantizeError
from learned_rounding.quant_core.recipes import Plan, make_plan, recognize_preset
from learned_rounding.quant_core.run.estimate import estimate_size
from learned_rounding.quant_core.sources import TensorInfo
from learned_rounding.tests.architectures.collect import TEXT_ENCODERS
from learned_rounding.tests.architectures.lists import architectures, read, title

__all__ = [
    "CHECKPOINT",
    "CONVERTED",
    "DOCUMENT",
    "ENCODERS",
    "RENAMED",
    "Found",
    "document",
    "examine",
    "row",
    "source",
]

DOCUMENT = Path(__file__).parents[2] / "docs" / "models.md"
HEAD = """# Models

Plans of the models that ComfyUI supports when only a format is chosen, from their true tensors (built from ComfyUI's own classes,
or read from its sources where the model is newer than ComfyUI 0.33; `tests/architectures/lists`), the presets and the roles of layers. Written by
`python tests/architectures/table.py`; a test compares.

*quantized* is the share of the parameters in quantized layers; every format takes all of these layers, where those of 4 bits
leave some in INT8 (first and last blocks, down-projections, modulation, layers outside the blocks, shapes that they cannot hold, banks of
experts that ComfyUI does not read in the format). *ConvRot 256* is
the share of the layers that rotate in groups of 256 (others take 64 or 16), *blocks of 128* that of layers which whole blocks cover (others have
smaller blocks at their edge). Then the size of the file in GB for each format, its kept part in 16 bits, as `lrq plan` estimates it.

From which files: each of [the kinds of file](sources.md), whose errors by format stand there, and what depends on the model, *also from*: a *checkpoint* in
which it lies with other parts gives the same decisions; *in a checkpoint* a text encoder beside a model whose family ComfyUI reads it quantized with;
*diffusers* by Load Model in a graph, which has ComfyUI rename its layers, where each tensor gets its own name and shape back
(`tests/nodes/test_opening.py`), and for WAN, LTX-Video, Flux.2 and Hunyuan Video from any source; a file that has tensors without a
conversion is refused. Any other model, as those with *general rule* for a preset, is refused unless `--general`, or the switch *general* of
Learned Round Quantize, asks for the general rule alone.

"""
COLUMNS = (
    "model",
    "preset",
    "parameters",
    "quantized",
    "layers",
    "ConvRot 256",
    "blocks of 128",
    *(f"`{name}`" for name in FORMATS),
    "also from",
)
# Lists of models of which ComfyUI renames every tensor from diffusers' names, as tests/nodes/test_opening.py finds.
RENAMED = {
    "auraflow", "flux", "flux_fill", "flux_schnell", "koala_1b", "koala_700m", "longcat_image", "lotus_d", "pixart_alpha", "pixart_sigma", "sd15",
    "sd15_inpaint", "sd20", "sd21_unclip_h", "sd21_unclip_l", "sd35_large", "sd35_medium", "sd3_medium", "sdxl", "sdxl_instructpix2pix", "sdxl_refiner",
    "segmind_vega", "ssd_1b", "zimage",
}  # fmt: skip
# Lists of models under diffusers' names that this package converts, as tests/quant_core/sources/test_diffusers_names.py finds.
CONVERTED = {
    "flux2", "flux2_klein_4b", "flux2_klein_9b", "hunyuan", "hunyuan_1_5", "hunyuan_1_5_sr", "hunyuan_i2v", "hunyuan_skyreels", "ltxv", "ltxv_13b",
    "wan_22_5b", "wan_22_i2v", "wan_flf2v", "wan_i2v", "wan_t2v", "wan_t2v_1_3b", "wan_vace", "wan_vace_1_3b",
}  # fmt: skip
# Lists of text encoders → names of their parts in checkpoints, where they are others.
ENCODERS = {
    "t5": ("t5xxl",),
    "t5_old": ("t5xxl",),
    "umt5": ("umt5xxl",),
    "llama3_8b": ("llama",),
    "yue2_lm": ("",),
    "qwen3vl_8b": ("qwen3vl",),
    "gpt_oss_20b": ("gpt_oss",),
}
CHECKPOINT = "model.diffusion_model."


@dataclass(frozen=True, eq=False)
class Found:
    """What becomes of a model with nothing but detection.

    Attributes:
        name: of the list.
        preset: name of the preset that recognizes it, or None.
        plan: None if ComfyUI reads all of the model in full precision only.
        parameters: of the whole model.
        quantized: shapes of the layers to quantize, by tensor name.
    """

    name: str
    preset: str | None
    plan: Plan | None
    parameters: int
    quantized: dict[str, tuple[int, ...]]

    @property
    def sure(self) -> bool:
        """Whether the preset covers every layer to quantize."""
        return self.preset is not None and all(PRESETS[self.preset].blocks.search(tensor) for tensor in self.quantized)

    @property
    def share(self) -> float:
        """Parameters in quantized layers / all parameters."""
        return sum(map(math.prod, self.quantized.values())) / self.parameters

    def fitting(self, step: int, sides: slice = slice(None)) -> float:
        """Share of the quantized layers whose sides (out, in) are multiples of ``step``."""
        return sum(all(side % step == 0 for side in shape[-2:][sides]) for shape in self.quantized.values()) / len(
            self.quantized
        )

    @cached_property
    def sizes(self) -> dict[str, int]:
        """Format → bytes of the file; empty without a plan."""
        recipes = {format: Recipe(format=format) for format in FORMATS if self.plan}
        header = source(self.name)
        return {format: estimate_size(header, recipe, recipe.plan(header)) for format, recipe in recipes.items()}

    @cached_property
    def checkpoint(self) -> bool:
        """Whether the decisions are the same in a whole checkpoint."""
        if self.plan is None:
            return False
        inside = make_plan(source(self.name, CHECKPOINT)).decisions
        return inside == {CHECKPOINT + tensor: decision for tensor, decision in self.plan.decisions.items()}


def source(name: str, prefix: str = "") -> SimpleNamespace:
    """The header of a bfloat16 file of that model."""
    infos = {prefix + tensor: TensorInfo(torch.bfloat16, entry.shape) for tensor, entry in read(name).items()}
    return SimpleNamespace(name=name, tensors=infos, metadata={})


@cache
def examine(name: str) -> Found:
    """What becomes of the model of that list."""
    header = source(name)
    parameters = sum(math.prod(info.shape) for info in header.tensors.values())
    preset = recognize_preset(header.tensors)
    try:
        plan = make_plan(header)
    except NothingToQuantizeError:
        return Found(name, preset and preset.name, None, parameters, {})
    layers = {tensor: header.tensors[tensor].shape for tensor in plan.names("quantize")}
    return Found(name, preset and preset.name, plan, parameters, layers)


def _origins(name: str, found: Found) -> str:
    if name in TEXT_ENCODERS:
        beside = [
            preset.name
            for preset in PRESETS.values()
            if preset.detect and {name, *ENCODERS.get(name, ())} & set(preset.encoders)
        ]
        return f"in a checkpoint ({', '.join(beside)})" if beside else "–"
    renamed = ["diffusers"] if name in RENAMED | CONVERTED else []
    return ", ".join(["checkpoint"] * found.checkpoint + renamed) or "–"


def _cells(name: str) -> list[str]:
    found = examine(name)
    cells = [title(name), found.preset or "general rule", f"{found.parameters / 1e9:.2f} B"]
    if not found.quantized:
        kept = ["none: ComfyUI reads it in full precision only", "0", "–", "–"]
        return [*cells, *kept, *[f"{found.parameters * 2 / 1e9:.1f}"] * len(FORMATS), "–"]
    shares = (found.fitting(256, slice(1, 2)), found.fitting(128))
    sizes = (f"{size / 1e9:.1f}" for size in found.sizes.values())
    return [
        *cells,
        f"{found.share:.1%}",
        str(len(found.quantized)),
        *(f"{share:.0%}" for share in shares),
        *sizes,
        _origins(name, found),
    ]


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |\n"


def row(name: str) -> str:
    """The line of the model of that list."""
    return _line(_cells(name))


def document() -> str:
    """The whole document."""
    head = _line(COLUMNS) + _line(["---"] * len(COLUMNS))
    return HEAD + head + "".join(map(row, sorted(architectures(), key=lambda name: title(name).lower())))


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    DOCUMENT.write_text(document(), encoding="utf-8")
