"""Rounding: which quantized value each weight gets, and under which scale.

:mod:`.solve` is the way from a weight to its quantized values: scales (:mod:`.rtn`, :mod:`.scale_search`), what is minimised
(:mod:`.quadratic`, :mod:`.principal`), a solver (:mod:`.gptq`, :mod:`.projected`, :mod:`.gradient`, :mod:`.stochastic`),
and the comparison with round to nearest. :mod:`.options` are a user's choices.
"""

from .bias import correct_bias, synthetic_mean
from .gptq import round_gptq
from .gradient import round_gradient
from .memo import MatrixMemo, recall
from .optimizers import OPTIMIZERS, SCHEDULES
from .options import BIAS_CORRECTIONS, MODEL_ROUNDINGS, OPTIONS, ROUNDINGS, RoundingConfig
from .principal import Principal, principal_rank
from .projected import round_projected
from .quadratic import Quadratic, hessian_quadratic
from .rtn import amax_scale, round_to_nearest, weight_error
from .scale_search import search_scale
from .solve import WeightSolver
from .stochastic import round_stochastic

__all__ = [
    "BIAS_CORRECTIONS",
    "MODEL_ROUNDINGS",
    "OPTIMIZERS",
    "OPTIONS",
    "ROUNDINGS",
    "SCHEDULES",
    "MatrixMemo",
    "Principal",
    "Quadratic",
    "RoundingConfig",
    "WeightSolver",
    "amax_scale",
    "correct_bias",
    "hessian_quadratic",
    "principal_rank",
    "recall",
    "round_gptq",
    "round_gradient",
    "round_projected",
    "round_stochastic",
    "round_to_nearest",
    "search_scale",
    "synthetic_mean",
    "weight_error",
]
