"""What is known of layers' inputs: gathered while a model runs, kept in files, given to the rounding."""

from .file import SUFFIX, CalibrationFile
from .hessian import Gram, Inputs, LowRankGram, PackedGram, PairedGram, dense_gram, mean_vector, quantized_grams
from .histogram import input_scale
from .hooks import Collector
from .sensitivity import Sensitivity
from .statistics import Calibration, LayerInputs

__all__ = [
    "Calibration",
    "CalibrationFile",
    "Collector",
    "Gram",
    "Inputs",
    "LayerInputs",
    "LowRankGram",
    "PackedGram",
    "PairedGram",
    "SUFFIX",
    "Sensitivity",
    "dense_gram",
    "input_scale",
    "mean_vector",
    "quantized_grams",
]
