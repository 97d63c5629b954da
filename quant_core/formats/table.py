"""The table of file formats, each under the exact string ComfyUI's loader knows."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ..errors import RecipeError, UnknownNameError
from .granularity import GRANULARITIES, Granularity
from .grids import E4M3, INT8, Grid

__all__ = ["Format", "FORMATS", "find_format"]


@dataclass(frozen=True)
class Format:
    """One way a quantized linear layer stands in a file.

    Attributes:
        name: the ``format`` string of the layer's JSON.
        grid: the number grid of the codes.
        granularities: name → extra JSON keys; the first is the default.
        stock_since: oldest ComfyUI release whose stock loaders read it.
        full_precision_matmul: the JSON key ``full_precision_matrix_mult`` has an effect.
        note: one sentence for people.
    """

    name: str
    grid: Grid
    granularities: Mapping[str, Mapping[str, object]]
    stock_since: str
    full_precision_matmul: bool
    note: str

    def granularity(self, name: str | None = None) -> tuple[str, Granularity]:
        """The named granularity, or this format's own when ``name`` is None."""
        name = name or next(iter(self.granularities))
        if name not in GRANULARITIES:
            raise UnknownNameError("granularity", name, GRANULARITIES)
        if name not in self.granularities:
            have = " or ".join(self.granularities)
            raise RecipeError(
                f"Format {self.name} has one scale per {have}, not per {name}; choose another format or granularity."
            )
        return name, GRANULARITIES[name]

    def config(self, granularity: str, *, full_precision_matmul: bool = False) -> dict[str, object]:
        """The layer's JSON: the content of its ``comfy_quant`` tensor and of its header entry."""
        extra = {"full_precision_matrix_mult": True} if full_precision_matmul else {}
        return {"format": self.name, **self.granularities[granularity], **extra}

    def specs(self, granularity: str, shape: tuple[int, int]) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Key suffix → (dtype, shape) of the layer's tensors, its JSON tensor left aside."""
        _, share = self.granularity(granularity)
        return {"weight": (self.grid.dtype, tuple(shape)), "weight_scale": (torch.float32, share.shape(*shape))}


_TABLE = (
    Format(
        name="float8_e4m3fn",
        grid=E4M3,
        granularities={"tensor": {}},
        stock_since="0.3.75",
        full_precision_matmul=True,
        note="8-bit float, one scale per tensor; runs on FP8 tensor cores from SM 8.9 on, is decoded on older cards",
    ),
    Format(
        name="int8_tensorwise",
        grid=INT8,
        granularities={"row": {"per_row": True}, "tensor": {}},
        stock_since="0.27",
        full_precision_matmul=False,
        note="8-bit integer, one scale per row or per tensor; runs on INT8 tensor cores from SM 7.5 on",
    ),
)

FORMATS: Mapping[str, Format] = {entry.name: entry for entry in _TABLE}


def find_format(name: str) -> Format:
    """The format of that name, or :class:`UnknownNameError` with the nearest known one."""
    if name not in FORMATS:
        raise UnknownNameError("format", name, FORMATS)
    return FORMATS[name]
