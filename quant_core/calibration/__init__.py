"""What is known of layers' inputs: Grams, means, and where they are kept."""

from .gram import Gram, Inputs, LowRankGram, dense_gram, mean_vector
from .statistics import Calibration, CalibrationFile, LayerInputs

__all__ = [
    "Gram",
    "Inputs",
    "LowRankGram",
    "dense_gram",
    "mean_vector",
    "Calibration",
    "CalibrationFile",
    "LayerInputs",
]
