"""Calibration: collect statistics of input activations while a model runs, store them, and give them to the rounding."""

from .file import SUFFIX, CalibrationFile
from .hessian import (
    Hessian,
    LowRankHessian,
    PackedHessian,
    PairedHessian,
    TriangularHessian,
    dense_hessian,
    hessian_rms,
    low_rank_factor,
    mean_vector,
    quantized_hessians,
)
from .histogram import input_scale
from .hooks import Collector
from .recorder import ReplayRecorder
from .replay import CALLS_SUFFIX, ReplaySet
from .sensitivity import SensitivityAnalysis
from .statistics import Calibration, InMemoryCalibration, LayerStatistics

__all__ = [
    "CALLS_SUFFIX",
    "SUFFIX",
    "Calibration",
    "CalibrationFile",
    "Collector",
    "Hessian",
    "InMemoryCalibration",
    "LayerStatistics",
    "LowRankHessian",
    "PackedHessian",
    "PairedHessian",
    "ReplayRecorder",
    "ReplaySet",
    "SensitivityAnalysis",
    "TriangularHessian",
    "dense_hessian",
    "hessian_rms",
    "input_scale",
    "low_rank_factor",
    "mean_vector",
    "quantized_hessians",
]
