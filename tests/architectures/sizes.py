"""The table of README.md: file size of well-known models in each format, and memory and time per step where measured.

Sizes are those of the plan of each model's true tensors; measurements are those of benchmarks/results.

    python tests/architectures/sizes.py      (make architectures) writes the table between its markers
"""

import argparse
import json
import math
import re
from pathlib import Path
from typing import NamedTuple

from learned_rounding.quant_core.recipes import Recipe
from learned_rounding.quant_core.run.estimate import estimate_size
from learned_rounding.tests.architectures.table import source

__all__ = ["DOCUMENT", "render_table", "replace_table"]

_ROOT = Path(__file__).parents[2]
DOCUMENT = _ROOT / "README.md"
_RESULTS = _ROOT / "benchmarks" / "results" / "comfyui_h200.json"
_TABLE = re.compile(r"(?<=<!-- model sizes -->\n).*?(?=<!-- end of model sizes -->)", re.S)
# Title → list of the tensors. The first has the layers of the measured model.
_MODELS = {
    "Flux.1 dev": "flux",
    "Flux.2 dev": "flux2",
    "Qwen-Image": "qwen_image",
    "WAN 2.2 14B, each of the two": "wan_t2v",
    "Z-Image": "zimage",
}


class _Row(NamedTuple):
    """A format: its name in the table, options of its recipe, and its variant in the measurement, if there is one."""

    title: str
    options: dict[str, object]
    variant: str | None = None


_ROWS = (
    _Row("`fp8`", {"format": "fp8"}, "fp8_calibrated"),
    _Row("`fp8` per row", {"format": "float8_e4m3fn_rowwise"}, "fp8_row"),
    _Row("`fp8` per block", {"format": "float8_e4m3fn_blockwise"}, "fp8_block"),
    _Row("`float8_e5m2`", {"format": "float8_e5m2"}, "fp8_e5m2"),
    _Row("`int8`", {"format": "int8"}, "int8_convrot:auto"),
    _Row("`int8` per block", {"format": "int8_blockwise"}, "int8_block"),
    _Row("`mxfp8`", {"format": "mxfp8"}),
    _Row("`w6a8`", {"format": "w6a8"}, "w6a8"),
    _Row("`w4a8`, `int4`", {"format": "w4a8"}, "w4a8_preset:auto"),
    _Row("`nvfp4`", {"format": "nvfp4"}),
    _Row("`w4a4`", {"format": "w4a4"}, "w4a4"),
)
_NOT_MEASURED = "not measured"


def _gigabytes(size: int) -> str:
    """Three significant digits of 10⁹ bytes."""
    digits = 2 - math.floor(math.log10(size / 1e9))
    return f"{size / 1e9:.{digits}f}"


def _sizes(options: dict[str, object] | None) -> list[str]:
    cells = []
    for name in _MODELS.values():
        header = source(name)
        if options is None:
            size = sum(info.nbytes for info in header.tensors.values())
        else:
            recipe = Recipe(**options)
            size = estimate_size(header, recipe, recipe.plan(header))
        cells.append(_gigabytes(size))
    return cells


def _measurements() -> dict[str, list[str]]:
    """Variant → VRAM in GB, seconds per step."""
    rows = json.loads(_RESULTS.read_text(encoding="utf-8"))["rows"]
    return {
        row["variant"]: [f"{row['VRAM GB']:.1f}", f"{row['step s']:.3f}"] for row in rows if row["section"] == "eager"
    }


def render_table() -> str:
    """The table in Markdown."""
    measured = _measurements()
    columns = ["format", *_MODELS, "Flux.1: VRAM", "Flux.1: s per step"]
    rows = [columns, ["---"] * len(columns), ["bf16", *_sizes(None), *measured["bf16"]]]
    rows += [[row.title, *_sizes(row.options), *measured.get(row.variant, [_NOT_MEASURED] * 2)] for row in _ROWS]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in rows)


def replace_table(text: str) -> str:
    """The document with the table of today."""
    return _TABLE.sub(lambda _: f"\n{render_table()}\n", text)


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    DOCUMENT.write_text(replace_table(DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")
    print(render_table(), end="")


if __name__ == "__main__":
    main()
