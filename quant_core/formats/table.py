"""The table of file formats, each under the exact string ComfyUI's loader knows."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from ..errors import UnknownNameError
from .elements import E4M3, E5M2, INT8, Grid

__all__ = ["Format", "FORMATS", "find_format", "sibling", "with_granularity"]


@dataclass(frozen=True)
class Format:
    """One way a quantized linear layer stands in a file.

    Attributes:
        name: the ``format`` string of the layer's JSON.
        grid: the number grid of the codes.
        granularities: name → extra JSON keys; the first is the default.
        stock_since: oldest ComfyUI release whose stock loaders read it; None: they do not, this pack does.
        full_precision_matmul: whether the JSON key ``full_precision_matrix_mult``, by which ComfyUI decodes a weight instead
            of multiplying its codes, is a "choice", "always" there because nothing multiplies such codes, or "never".
        note: one sentence for people.
        inputs: what shares a scale when a layer's inputs are quantized to the same grid: the whole "tensor", by an
            ``input_scale`` that the layer may carry, each "token", or the "block" of a token; None leaves them as they are.
    """

    name: str
    grid: Grid
    granularities: Mapping[str, Mapping[str, object]]
    stock_since: str | None
    full_precision_matmul: Literal["choice", "always", "never"]
    note: str
    inputs: Literal["tensor", "token", "block"] | None = None


_TABLE = (
    Format(
        name="float8_e4m3fn",
        grid=E4M3,
        granularities={"tensor": {}},
        stock_since="0.3.75",
        full_precision_matmul="choice",
        note="8-bit float, one scale per tensor; runs on FP8 tensor cores from SM 8.9 on, is decoded on older cards",
        inputs="tensor",
    ),
    Format(
        name="float8_e5m2",
        grid=E5M2,
        granularities={"tensor": {}},
        stock_since="0.8",
        full_precision_matmul="always",  # no NVIDIA card multiplies two E5M2 matrices
        note="8-bit float with two mantissa bits, decoded on every card: twice the error of e4m3, for weights of a huge range",
    ),
    Format(
        name="int8_tensorwise",
        grid=INT8,
        granularities={"row": {"per_row": True}, "tensor": {}},
        stock_since="0.27",
        full_precision_matmul="never",
        note="8-bit integer, one scale per row or per tensor; runs on INT8 tensor cores from SM 7.5 on",
        inputs="token",
    ),
    Format(
        name="float8_e4m3fn_rowwise",
        grid=E4M3,
        granularities={"row": {}},
        stock_since=None,
        full_precision_matmul="never",
        note="8-bit float, one scale per row",
        inputs="token",
    ),
    Format(
        name="float8_e4m3fn_blockwise",
        grid=E4M3,
        granularities={"block": {}},
        stock_since=None,
        full_precision_matmul="never",
        note="8-bit float, one scale per square block",
        inputs="block",
    ),
    Format(
        name="int8_blockwise",
        grid=INT8,
        granularities={"block": {}},
        stock_since=None,
        full_precision_matmul="never",
        note="8-bit integer, one scale per square block",
        inputs="block",
    ),
)

FORMATS: Mapping[str, Format] = {entry.name: entry for entry in _TABLE}


def find_format(name: str) -> Format:
    """The format of that name, or :class:`UnknownNameError` with the nearest known one."""
    if name not in FORMATS:
        raise UnknownNameError("format", name, FORMATS)
    return FORMATS[name]


def with_granularity(name: str, granularity: str | None) -> str:
    """That format, or its sibling where the granularity is the sibling's; :class:`UnknownNameError` for an unknown one."""
    entry = find_format(name)
    other = None if granularity in (None, *entry.granularities) else sibling(entry, granularity)
    return (other or entry).name


def sibling(entry: Format, granularity: str) -> Format | None:
    """The format of the same number grid that has this granularity, if there is one."""
    return next(
        (other for other in FORMATS.values() if other.grid == entry.grid and granularity in other.granularities), None
    )
