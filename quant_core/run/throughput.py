"""Measured throughput of the rounding methods, and the estimate of the time of a run that follows from it.

The estimate is proportional to the number of parameters, and to the multiprocessors of a GPU or the cores of a CPU. It takes no
time itself; :func:`.estimate.estimate_seconds` measures the layers of the model instead.
"""

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

__all__ = ["THROUGHPUT", "Throughput", "predict_seconds"]

_FULL = 8  # bits; formats of fewer bits are rounded by groups, which takes longer


@dataclass(frozen=True)
class Throughput:
    """A measurement.

    Attributes:
        parameters_per_second: of the weights that were quantized, from file to file unless ``source`` names another scope.
        units: multiprocessors of the GPU, or cores of the CPU, that was measured.
        source: file in ``benchmarks/results``, or section of ``benchmarks/README.md``, with the size and time.
    """

    parameters_per_second: float
    units: int
    source: str


def _h200(parameters: float, seconds: float, source: str) -> Throughput:
    return Throughput(parameters / seconds, 132, source)


def _cpu(parameters: float, seconds: float, source: str) -> Throughput:
    return Throughput(parameters / seconds, 2, source)


_FLUX, _FLUX_6GB = 11.9e9, 3.06e9  # parameters of Flux.1 dev, and of the model in its shapes of 6.1 GB
_CPU_PLAN, _CPU_STREAM, _MINILM = 186e6, 510e6, 10.6e6
_MINILM_RESULTS = "rounding_formats_minilm_cpu.json, rounding alone"

# (kind of device, rounding, whether the format has 8 bits or more) → measurement. The rounding "auto" is without a calibration.
THROUGHPUT: Mapping[tuple[str, str, bool], Throughput] = {
    ("cuda", "nearest", True): _h200(_FLUX_6GB, 2.61, "stream_h200.json, INT8 per row"),
    ("cuda", "auto", True): _h200(_FLUX_6GB, 3.59, "stream_h200.json, INT8 per row"),
    ("cuda", "principal", True): _h200(_FLUX, 54.4, "section 'What a run takes', INT8 with ConvRot"),
    ("cuda", "calibrated", True): _h200(_FLUX, 50.4, "calibrated_h200.json, INT8 with ConvRot"),
    ("cuda", "calibrated", False): _h200(_FLUX, 50.7, "calibration_speed_w4a8_h200.json, W4A8, rounding alone"),
    ("cuda", "sequential", False): _h200(_FLUX, 338, "sequential_flux_h200.json, W4A8"),
    ("cpu", "nearest", True): _cpu(_CPU_STREAM, 2.32, "stream_cpu.json, FP8"),
    ("cpu", "auto", True): _cpu(_CPU_PLAN, 3.55, "plan_cpu.json, FP8"),
    ("cpu", "principal", True): _cpu(_CPU_PLAN, 16.7, "plan_cpu.json, INT8 with ConvRot"),
    ("cpu", "calibrated", True): _cpu(_MINILM, 68.5, _MINILM_RESULTS),
    ("cpu", "nearest", False): _cpu(_MINILM, 11.0, _MINILM_RESULTS),
    ("cpu", "auto", False): _cpu(_MINILM, 34.8, _MINILM_RESULTS),
    ("cpu", "calibrated", False): _cpu(_MINILM, 316, _MINILM_RESULTS),
}


def predict_seconds(layers: Iterable[tuple[int, str, float]], device: torch.device) -> float | None:
    """Time in s to quantize layers on ``device``; None if a rounding was not measured on such a device.

    A rounding that was measured in one of both widths is taken to be as fast in the other.

    Args:
        layers: parameters, rounding ("auto": without a calibration) and bits per weight of each layer.
    """
    seconds, units = 0.0, _count_units(device)
    for parameters, rounding, bits in layers:
        wide = bits >= _FULL
        found = THROUGHPUT.get((device.type, rounding, wide)) or THROUGHPUT.get((device.type, rounding, not wide))
        if found is None or not units:
            return None
        seconds += parameters / found.parameters_per_second * found.units / units
    return seconds


def _count_units(device: torch.device) -> int:
    """Multiprocessors of a GPU, cores of the CPU, 0 for other devices."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return (os.cpu_count() or 1) if device.type == "cpu" else 0
