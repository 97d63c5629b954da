"""Formats: element formats, scales, and the codec that stores a quantized layer, one module per family."""

from .codec import Codec, Format, Parts, TensorSpec
from .config import MEASURED, FormatConfig
from .detect import StoredLayer, detect_layer, detect_layers
from .elements import E2M1, E4M3, E5M2, INT4, INT8, ElementFormat
from .expert_bank import QuantizedBank
from .levels import GroupLevels
from .rotation import GROUP_SIZES, LARGE_GROUP_SIZES, Rotation, rotation_groups
from .scales import GRANULARITIES, ScaleGroups
from .smoothing import Smoothing
from .solution import Solution
from .space import SolveSpace
from .table import FORMATS, READABLE, find_format, find_sibling, make_codec, with_granularity
from .weight import QuantizedWeight

__all__ = [
    "E2M1",
    "E4M3",
    "E5M2",
    "FORMATS",
    "GRANULARITIES",
    "GROUP_SIZES",
    "INT4",
    "INT8",
    "LARGE_GROUP_SIZES",
    "MEASURED",
    "READABLE",
    "Codec",
    "ElementFormat",
    "Format",
    "FormatConfig",
    "GroupLevels",
    "Parts",
    "QuantizedBank",
    "QuantizedWeight",
    "Rotation",
    "ScaleGroups",
    "Smoothing",
    "Solution",
    "SolveSpace",
    "StoredLayer",
    "TensorSpec",
    "detect_layer",
    "detect_layers",
    "find_format",
    "find_sibling",
    "make_codec",
    "rotation_groups",
    "with_granularity",
]
