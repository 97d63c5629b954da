"""The ways to round that ``rounding.py`` compares: this project's own, and the published tool."""

import contextlib
import importlib.util
import inspect
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch

from learned_rounding.quant_core import FORMATS, quantize_weight
from learned_rounding.quant_core.formats import Codec, make_codec, rotation_groups

__all__ = ["CASES", "DEVICE", "FEW", "Case", "Known", "Outcome", "Ours", "Published", "Way"]

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True)
class Case:
    """A format with its granularity; ``rotated``: with ConvRot."""

    format: str
    granularity: str
    rotated: bool = False

    def encoding(self, inner: int) -> Codec:
        """As a weight of ``inner`` input channels has it."""
        return make_codec(
            self.format, self.granularity, convrot=rotation_groups(self.rotated, inner)[0] if self.rotated else None
        )

    @property
    def columns(self) -> dict[str, str]:
        """How it stands in a row."""
        return {"format": self.format, "per": f"{self.granularity}, rotated" if self.rotated else self.granularity}


CASES = (
    *(Case(name, granularity) for name, entry in FORMATS.items() for granularity in entry.granularities),
    Case("int8_tensorwise", "row", rotated=True),
)
FEW = (Case("float8_e4m3fn", "tensor"), Case("int8_tensorwise", "row"))  # for what is slow


@dataclass(frozen=True)
class Known:
    """What is known of a layer's inputs."""

    gram: torch.Tensor
    holdout: torch.Tensor | None = None
    mean: torch.Tensor | None = None


@dataclass(frozen=True)
class Outcome:
    """Ŵ float32, the corrected bias if there is one, who chose the codes, and what that took."""

    weight: torch.Tensor
    seconds: float
    peak_mb: float | None
    solver: str = ""
    bias: torch.Tensor | None = None


class Way(Protocol):
    """A way to round."""

    name: str
    calibrated: bool

    def covers(self, case: Case) -> bool:
        """Whether this benchmark has a row for it."""

    def __call__(self, weight: torch.Tensor, case: Case, known: Known | None, bias: torch.Tensor | None) -> Outcome:
        """Round one weight."""


class Ours:
    """A rounding of this project with its options; ``few``: for few formats only."""

    def __init__(self, name: str, rounding: str, few: bool = False, **options):
        self.name, self._few, self._options = name, few, {"rounding": rounding, **options}
        self.calibrated = rounding == "calibrated"

    def covers(self, case: Case) -> bool:
        return not self._few or case in FEW

    def __call__(self, weight, case, known=None, bias=None) -> Outcome:
        inputs = {"hessian": known.gram, "validation_hessian": known.holdout} if self.calibrated else {}
        if known and known.mean is not None:
            inputs |= {"mean": known.mean, "bias": bias}
        made, seconds, peak = _measured(
            lambda: quantize_weight(
                weight, case.format, granularity=case.granularity, convrot=case.rotated, **inputs, **self._options
            )
        )
        return Outcome(made.dequantize(), seconds, peak, made.solution.solver, made.bias)


class Published:
    """``convert-to-quant``, learned or nearest, as its command line runs it without further options."""

    calibrated = False

    def __init__(self, learned: bool, iterations: int | None = None):
        self._learned, self._iterations = learned, iterations
        steps = iterations or self._defaults([])["num_iter"]
        self.name = f"published, {steps} steps" if learned else "published, nearest"

    def covers(self, case: Case) -> bool:
        needs_scipy = case.format == "int8_tensorwise"  # which its package does not name as a requirement
        return case.format != "float8_e5m2" and (not needs_scipy or importlib.util.find_spec("scipy") is not None)

    def __call__(self, weight, case, known=None, bias=None) -> Outcome:
        int8 = case.format.startswith("int8")
        command = ["--scaling_mode", case.granularity]
        command += ["--block_size", "128"] if case.granularity == "block" else []
        command += ["--int8"] if int8 else []
        command += ["--convrot"] if case.rotated else []
        command += ["--num_iter", str(self._iterations)] if self._iterations else []
        defaults = self._defaults(command)
        from convert_to_quant.converters.base_converter import BaseLearnedConverter
        from convert_to_quant.converters.learned_rounding import LearnedRoundingConverter

        taken = {name for kind in (LearnedRoundingConverter, BaseLearnedConverter) for name in _parameters(kind)}
        options = {name: value for name, value in defaults.items() if name in taken} | {
            "target_format": "int8" if int8 else "fp8",
            "no_learned_rounding": not self._learned,
            "primary_int8_convrot_compat": int8,
            "device": str(DEVICE),
        }
        generator = torch.Generator().manual_seed(0)
        inputs = torch.randn(defaults["calib_samples"], weight.shape[1], generator=generator)
        torch.manual_seed(0)
        with _silence(), torch.enable_grad():
            converter = LearnedRoundingConverter(**options)
            made, seconds, peak = _measured(lambda: converter.convert(weight, calibration_data=inputs, has_bias=True))
        codes, scale = made[:2]
        encoding = case.codec(weight.shape[1])
        tiles = encoding.tiles(tuple(weight.shape))
        values = codes.float() * tiles.spread(scale.float().reshape(tiles.counts).to(codes.device))
        return Outcome(encoding.rotation.apply(values) if encoding.rotation else values, seconds, peak)

    @staticmethod
    def _defaults(command: list[str]) -> dict[str, object]:
        from convert_to_quant.cli.main import get_parser

        return vars(get_parser().parse_args(["--input", "", *command]))


def _parameters(kind: type) -> list[str]:
    return list(inspect.signature(kind.__init__).parameters)


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    with open(os.devnull, "w") as nowhere:
        with contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
            yield


def _measured(call: Callable):
    """What ``call`` returns, its seconds and, on a GPU, the most memory in MB it held beside what was there before."""
    gpu = DEVICE.type == "cuda"
    if gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    start = time.perf_counter()
    result = call()
    if gpu:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    return result, seconds, (torch.cuda.max_memory_allocated() - before) / 1e6 if gpu else None
