"""What a quantized weight is: number grid × scale granularity × rotation × file keys; one table of formats."""

from .config import MEASURED, FormatConfig
from .elements import E4M3, E5M2, INT8, Grid
from .encoding import ROTATED, Encoding, make_encoding
from .external import FOREIGN, ForeignFormat
from .rotation import GROUP_SIZES, Rotation, rotation_groups
from .scales import GRANULARITIES, Tiles
from .table import FORMATS, Format, find_format, sibling, with_granularity
from .weight import QuantizedWeight, Rounded

__all__ = [
    "MEASURED",
    "FormatConfig",
    "E4M3",
    "E5M2",
    "INT8",
    "Grid",
    "GRANULARITIES",
    "Tiles",
    "GROUP_SIZES",
    "Rotation",
    "rotation_groups",
    "FOREIGN",
    "ForeignFormat",
    "FORMATS",
    "Format",
    "find_format",
    "sibling",
    "with_granularity",
    "ROTATED",
    "Encoding",
    "make_encoding",
    "QuantizedWeight",
    "Rounded",
]
