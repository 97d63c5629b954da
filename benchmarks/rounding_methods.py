"""Rounding methods that ``rounding.py`` compares: those of this project, and the published tool."""

import contextlib
import importlib.util
import inspect
import itertools
import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch

from learned_rounding.quant_core import FORMATS, quantize_weight
from learned_rounding.quant_core.calibration import LayerStatistics
from learned_rounding.quant_core.formats import Codec, Format, FormatConfig

__all__ = [
    "CASES",
    "DEVICE",
    "FEW_CASES",
    "Case",
    "ComfyKitchen",
    "LibraryMethod",
    "PublishedTool",
    "RoundedWeight",
    "RoundingMethod",
    "dequantize",
    "norm",
    "output_loss",
    "peak",
    "select_cases",
]

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

T = TypeVar("T")


@dataclass(frozen=True)
class Case:
    """Format and granularity; ``rotated``: with ConvRot; others as in :class:`FormatConfig`."""

    format: str
    granularity: str
    rotated: bool = False
    bits: int | None = None
    linear_dtype: str | None = None

    @property
    def config(self) -> FormatConfig:
        """The format part of a recipe."""
        return FormatConfig(
            self.format,
            self.granularity,
            convrot=self.rotated or None,
            bits=self.bits,
            linear_dtype=self.linear_dtype,
        )

    def codec(self, in_channels: int) -> Codec:
        """Codec of a layer with ``in_channels`` input channels."""
        return self.config.codecs(in_channels)[0]

    @property
    def columns(self) -> dict[str, str]:
        """Columns of a row that identify the case."""
        parts = (
            self.granularity,
            "rotated" if self.rotated else None,
            f"{self.bits} bits" if self.bits else None,
            f"{self.linear_dtype} activations" if self.linear_dtype else None,
        )
        return {"format": self.format, "per": ", ".join(part for part in parts if part)}


def _options(entry: Format) -> list[dict]:
    """All combinations of the options of a format; [{}] without options."""
    options = entry.codec.options
    return [dict(zip(options, values, strict=True)) for values in itertools.product(*options.values())]


CASES = (
    *(
        Case(name, granularity, **options)
        for name, entry in FORMATS.items()
        for granularity in entry.granularities
        for options in _options(entry)
    ),
    Case("int8_tensorwise", "row", rotated=True),
)
FEW_CASES = (Case("float8_e4m3fn", "tensor"), Case("int8_tensorwise", "row"))  # for slow methods


def select_cases(cases: Iterable[Case], formats: Iterable[str]) -> list[Case]:
    """Return the cases whose format is among ``formats``."""
    return [case for case in cases if case.format in formats]


@dataclass(frozen=True)
class RoundedWeight:
    """Result of a rounding method, and its cost.

    Attributes:
        weight: Ŵ (out, in), float32.
        seconds: run time in s.
        peak_mb: additional peak GPU memory in MB; None on a CPU.
        solver: solver that chose the quantized values; empty if the method does not report it.
        bias: corrected bias (out,); None without bias correction.
    """

    weight: torch.Tensor
    seconds: float
    peak_mb: float | None
    solver: str = ""
    bias: torch.Tensor | None = None


class RoundingMethod(Protocol):
    """Rounding method with fixed options.

    Attributes:
        name: column ``method`` of a row.
        calibrated: whether it uses a Hessian.
    """

    name: str
    calibrated: bool

    def covers(self, case: Case) -> bool:
        """Whether the benchmark measures this method for ``case``."""
        ...

    def __call__(
        self,
        weight: torch.Tensor,
        case: Case,
        statistics: LayerStatistics | None = None,
        bias: torch.Tensor | None = None,
    ) -> RoundedWeight:
        """Round a weight (out, in)."""
        ...


class LibraryMethod:
    """Rounding method of this project with its options; ``few_cases``: measure it for :data:`FEW_CASES` only."""

    def __init__(self, name: str, rounding: str, *, few_cases: bool = False, **options):
        self.name, self._few_cases, self._options = name, few_cases, {"rounding": rounding, **options}
        self.calibrated = rounding == "calibrated"

    def covers(self, case: Case) -> bool:
        return not self._few_cases or case in FEW_CASES

    def __call__(
        self,
        weight: torch.Tensor,
        case: Case,
        statistics: LayerStatistics | None = None,
        bias: torch.Tensor | None = None,
    ) -> RoundedWeight:
        statistics = statistics or LayerStatistics()
        inputs = {}
        if self.calibrated:
            inputs |= {"hessian": statistics.hessian, "validation_hessian": statistics.validation_hessian}
        if statistics.mean is not None:
            inputs |= {"mean": statistics.mean, "bias": bias}
        config = case.config
        choices = {name: getattr(config, name) for name in ("granularity", "convrot", "bits", "linear_dtype")}
        quantized, seconds, peak_mb = _measure(
            lambda: quantize_weight(weight, case.format, **choices, **inputs, **self._options)
        )
        return RoundedWeight(quantized.dequantize(), seconds, peak_mb, quantized.solution.solver, quantized.bias)


class ComfyKitchen:
    """comfy-kitchen's own quantizer of W4A8 and W6A8 with its defaults.

    Its quantizers of the other formats make the same bytes as ``nearest`` (tests/quant_core/formats).
    """

    name = "comfy-kitchen"
    calibrated = False

    def covers(self, case: Case) -> bool:
        return case.format == "asym_w4a8_int8" and (case.bits != 6 or "bits" in self._parameters())

    def __call__(
        self,
        weight: torch.Tensor,
        case: Case,
        statistics: LayerStatistics | None = None,
        bias: torch.Tensor | None = None,
    ) -> RoundedWeight:
        from comfy_kitchen.tensor import quantize_w4a8_int8_weight

        codec = case.codec(weight.shape[1])
        assert codec.rotation is not None
        options = {"convrot_groupsize": codec.rotation.size} | ({"bits": 6} if case.bits == 6 else {})
        tensors, seconds, peak_mb = _measure(lambda: quantize_w4a8_int8_weight(weight.float(), **options))
        packed, relative, channel, _, codebook = tensors
        parts = {"weight": packed, "weight_s_rel": relative, "weight_s_channel": channel}
        if codebook is not None:
            parts["weight_codebook"] = codebook
        return RoundedWeight(codec.dequantize(parts, (weight.shape[0], weight.shape[1])), seconds, peak_mb)

    @staticmethod
    def _parameters() -> list[str]:
        from comfy_kitchen.backends.eager.w4a8_int8 import quantize_w4a8_int8_weight

        return list(inspect.signature(quantize_w4a8_int8_weight).parameters)


class PublishedTool:
    """``convert-to-quant`` with the defaults of its command line, learned or round to nearest."""

    calibrated = False
    # Formats that its learned rounding supports.
    _FORMATS = (
        "float8_e4m3fn",
        "float8_e4m3fn_rowwise",
        "float8_e4m3fn_blockwise",
        "int8_tensorwise",
        "int8_blockwise",
    )

    def __init__(self, *, learned: bool, iterations: int | None = None):
        self._learned, self._iterations = learned, iterations
        steps = iterations or self._parse_defaults([])["num_iter"]
        self.name = f"published, {steps} steps" if learned else "published, nearest"

    def covers(self, case: Case) -> bool:
        # Its INT8 rounding imports scipy, which its package does not list as a requirement.
        available = case.format != "int8_tensorwise" or importlib.util.find_spec("scipy") is not None
        return case.format in self._FORMATS and available

    def __call__(
        self,
        weight: torch.Tensor,
        case: Case,
        statistics: LayerStatistics | None = None,
        bias: torch.Tensor | None = None,
    ) -> RoundedWeight:
        int8 = case.format.startswith("int8")
        command = ["--scaling_mode", case.granularity]
        command += ["--block_size", "128"] if case.granularity == "block" else []
        command += ["--int8"] if int8 else []
        command += ["--convrot"] if case.rotated else []
        command += ["--num_iter", str(self._iterations)] if self._iterations else []
        defaults = self._parse_defaults(command)
        from convert_to_quant.converters.base_converter import BaseLearnedConverter
        from convert_to_quant.converters.learned_rounding import LearnedRoundingConverter

        accepted = {name for kind in (LearnedRoundingConverter, BaseLearnedConverter) for name in _parameters(kind)}
        options = {name: value for name, value in defaults.items() if name in accepted} | {
            "target_format": "int8" if int8 else "fp8",
            "no_learned_rounding": not self._learned,
            "primary_int8_convrot_compat": int8,
            "device": str(DEVICE),
        }
        generator = torch.Generator().manual_seed(0)
        activations = torch.randn(defaults["calib_samples"], weight.shape[1], generator=generator)
        torch.manual_seed(0)
        with _suppress_output(), torch.enable_grad():
            converter = LearnedRoundingConverter(**options)
            (qdata, scale, *_), seconds, peak_mb = _measure(
                lambda: converter.convert(weight, calibration_data=activations, has_bias=True)
            )
        return RoundedWeight(dequantize(case.codec(weight.shape[1]), qdata, scale), seconds, peak_mb)

    @staticmethod
    def _parse_defaults(command: list[str]) -> dict:
        from convert_to_quant.cli.main import get_parser

        return vars(get_parser().parse_args(["--input", "", *command]))


def dequantize(codec: Codec, qdata: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Dequantize a weight whose scale may have any shape.

    Args:
        codec: format of the layer.
        qdata: quantized values (out, in), rotated if the codec has ConvRot.
        scale: one element per scale group.

    Returns:
        Ŵ (out, in), float32, in the original basis.
    """
    space = codec.solve_space(tuple(qdata.shape))
    scale = scale.to(qdata.device, torch.float32).reshape(space.groups.counts)
    return codec.restore_weight(space.decode(qdata, scale))


def output_loss(error: torch.Tensor, hessian: torch.Tensor) -> float:
    """Compute √tr(E·H·Eᵀ)."""
    return float(((error @ hessian) * error).sum(dtype=torch.float64).clamp_min(0).sqrt())


def norm(matrix: torch.Tensor) -> float:
    """Compute the Frobenius norm in float64."""
    return float(torch.linalg.vector_norm(matrix, dtype=torch.float64))


def peak(results: Iterable[RoundedWeight]) -> dict[str, float]:
    """Return the column "peak MB" of a row; empty on a CPU."""
    peaks = [result.peak_mb for result in results if result.peak_mb is not None]
    return {"peak MB": max(peaks)} if peaks else {}


def _parameters(kind: type) -> list[str]:
    return list(inspect.signature(kind.__init__).parameters)


@contextlib.contextmanager
def _suppress_output() -> Iterator[None]:
    with (
        open(os.devnull, "w", encoding="utf-8") as null,
        contextlib.redirect_stdout(null),
        contextlib.redirect_stderr(null),
    ):
        yield


def _measure(call: Callable[[], T]) -> tuple[T, float, float | None]:
    """Return the result of ``call``, its run time in s and, on a GPU, its additional peak memory in MB."""
    gpu = DEVICE.type == "cuda"
    before = 0
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
