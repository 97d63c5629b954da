"""Time of the phases of calibrated rounding: functions of the library, wrapped while a run is measured."""

import contextlib
import importlib
import time
from collections import defaultdict
from collections.abc import Iterator

import torch

from learned_rounding.quant_core.calibration import CalibrationFile, LayerStatistics
from learned_rounding.quant_core.output import SafetensorsWriter
from learned_rounding.quant_core.rounding import Quadratic, solve
from learned_rounding.quant_core.sources import SafetensorsFile

__all__ = ["measure_phases"]

quantize_layer = importlib.import_module(
    "learned_rounding.quant_core.quantize_layer"
)  # the package exports the function

# Phase → functions that belong to it. Those in threads run beside the others; statistics are also tensors.
_PHASES = {
    "read tensors (thread)": ((SafetensorsFile, "read"),),
    "read statistics (thread)": ((CalibrationFile, "layer_statistics"),),
    "copy statistics (thread)": ((LayerStatistics, "move_hessian"),),
    "write (thread)": ((SafetensorsWriter, "add"),),
    "expand Hessian": ((quantize_layer, "dense_hessian"), (quantize_layer, "low_rank_factor")),
    "factorize": ((solve, "factorize"),),
    "GPTQ": ((solve, "round_gptq"),),
    "search scale": ((solve, "amax_scale"), (solve, "search_scale")),
    "round to nearest": ((solve, "round_to_nearest"),),
    "compare": ((Quadratic, "loss"), (solve, "weight_error")),
}


@contextlib.contextmanager
def measure_phases(device: torch.device) -> Iterator[dict[str, float]]:
    """Yield phase → seconds, filled while the context is open; the device is synchronized before and after each function."""
    seconds: dict[str, float] = defaultdict(float)

    def synchronize() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    def wrap(phase: str, function):
        threaded = phase.endswith("(thread)")

        def timed(*args, **options):
            if not threaded:
                synchronize()
            start = time.perf_counter()
            try:
                return function(*args, **options)
            finally:
                if not threaded:
                    synchronize()
                seconds[phase] += time.perf_counter() - start

        return timed

    originals = [(owner, name, getattr(owner, name)) for targets in _PHASES.values() for owner, name in targets]
    try:
        for phase, targets in _PHASES.items():
            for owner, name in targets:
                setattr(owner, name, wrap(phase, getattr(owner, name)))
        yield seconds
    finally:
        for owner, name, function in originals:
            setattr(owner, name, function)
