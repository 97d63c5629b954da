"""What a quantized weight is: number grid × scale granularity × file keys; one table of formats."""

from .granularity import GRANULARITIES, Granularity
from .grids import E4M3, INT8, Grid
from .table import FORMATS, Format, find_format
from .weight import QuantizedWeight

__all__ = [
    "E4M3",
    "INT8",
    "Grid",
    "GRANULARITIES",
    "Granularity",
    "FORMATS",
    "Format",
    "find_format",
    "QuantizedWeight",
]
