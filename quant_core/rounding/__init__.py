"""Which code each weight gets, and under which scale: objectives × solvers × formats.

An objective (:mod:`.objectives`) says what is minimised; a scale (:mod:`.scales`) is searched for it; a solver
(:mod:`.nearest`, :mod:`.sequential`, :mod:`.gradient`, :mod:`.stochastic`) chooses the codes; :mod:`.rounder` puts them
together and keeps nearest where nothing is better.
"""

from .bias import correct_bias, synthetic_mean
from .gptq import round_sequential
from .gradient import round_gradient
from .objectives import Calibrated, Identity, Objective, Principal, Quadratic
from .optimizers import OPTIMIZERS, SCHEDULES
from .options import BIAS_CORRECTIONS, OPTIONS, ROUNDINGS, RoundingConfig
from .rounder import Candidate, Rounder, make_objectives
from .rtn import quantize_nearest, weight_error
from .scale_search import amax_scale, search_scale
from .stochastic import round_stochastic

__all__ = [
    "ROUNDINGS",
    "BIAS_CORRECTIONS",
    "OPTIONS",
    "OPTIMIZERS",
    "SCHEDULES",
    "RoundingConfig",
    "Rounder",
    "Candidate",
    "make_objectives",
    "Objective",
    "Quadratic",
    "Identity",
    "Calibrated",
    "Principal",
    "amax_scale",
    "search_scale",
    "quantize_nearest",
    "round_sequential",
    "round_gradient",
    "round_stochastic",
    "weight_error",
    "correct_bias",
    "synthetic_mean",
]
