"""Candidates of format measured: the formats to try, and the size, error and time of a layer in each of them.

Each layer is quantized in every candidate format and run on its validation activations, quantized as ComfyUI quantizes them on
the card. Errors are those of the rounding that the run uses. Formats of 4 bits are rounded so for every layer; the errors of
formats of 8 bits are those of round to nearest times a ratio, measured on the first layer of each type and format.

Formats of 4 bits are candidates where the target asks for less than 8 bits. W6A8 is not a candidate, since stock ComfyUI 0.33 does
not read it.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch

from ..calibration import Calibration, LayerStatistics
from ..cancellation import CancelCheck
from ..errors import NonFiniteWeightError
from ..formats import GROUP_SIZES, INT4, Codec, FormatConfig, QuantizedWeight
from ..formats.cards import find_support
from ..layer import Layer, output_error
from ..quantize_layer import quantize_layer
from ..recipes import Recipe
from ..rounding import RoundingConfig
from ..sources import Source
from .allocation import Option
from .card_times import CardTimes

__all__ = [
    "BLOCKS",
    "EIGHT_BITS",
    "FEWER_ACTIVATION_BITS",
    "FEW_BITS",
    "MICROSCALING",
    "LayerMeter",
    "find_candidates",
    "find_codec",
]

_MAX_ROWS = 512  # of validation activations

EIGHT_BITS = (
    FormatConfig("int8_tensorwise", "row"),
    *(FormatConfig("int8_tensorwise", "row", convrot=size) for size in GROUP_SIZES),
    FormatConfig("float8_e4m3fn", "tensor"),
)
FEW_BITS = tuple(FormatConfig(name) for name in ("asym_w4a8_int8", "nvfp4", "convrot_w4a4"))
FEWER_ACTIVATION_BITS = FormatConfig("convrot_w4a4", linear_dtype="int4")  # faster, with more error at the same size
MICROSCALING = FormatConfig("mxfp8")  # of no use on cards that do not multiply it
BLOCKS = (FormatConfig("int8_blockwise", "block"), FormatConfig("float8_e4m3fn_blockwise", "block"))


def find_candidates(recipe: Recipe, capability: tuple[int, int] | None, *, few_bits: bool) -> tuple[FormatConfig, ...]:
    """The formats to try for every layer.

    Args:
        capability: compute capability of the card that the model is for; None: any.
        few_bits: whether formats below 8 bits are tried.
    """
    native = capability is not None and find_support(MICROSCALING.codec, capability) == "native"
    faster = recipe.target_time is not None and FEWER_ACTIVATION_BITS.codec.activation_elements(capability) is INT4
    return (
        *EIGHT_BITS,
        *(FEW_BITS if few_bits else ()),
        *([FEWER_ACTIVATION_BITS] if few_bits and faster else []),
        *([MICROSCALING] if native else []),
        *(BLOCKS if recipe.block_formats else ()),
    )


def find_codec(format: FormatConfig, shape: tuple[int, int]) -> Codec | None:
    """The codec of a layer (out, in); None where it cannot be stored, or only with a smaller ConvRot group."""
    codec = format.codecs(shape[1])[0]
    smaller = type(format.convrot) is int and (codec.rotation is None or codec.rotation.size != format.convrot)
    return None if smaller or codec.admits(shape) else codec


@dataclass
class LayerMeter:
    """Measures the candidates of one layer after another.

    Attributes:
        candidates: formats to try.
        capability: compute capability of the card that the model is for; None: any.
        times: of layers on that card; None: times are not needed.
        device: of the arithmetic.
        check: called often; raises to cancel.
    """

    source: Source
    recipe: Recipe
    calibration: Calibration
    candidates: Iterable[FormatConfig]
    capability: tuple[int, int] | None
    times: CardTimes | None
    device: torch.device
    check: CancelCheck
    _ratios: dict[tuple[str, tuple[int, ...], FormatConfig], float] = field(default_factory=dict)

    def measure(self, name: str, sensitivity: float) -> list[Option]:
        """The unquantized layer, and every candidate that its shape allows; the former alone for NaN or Inf.

        Args:
            name: of the weight.
            sensitivity: squared relative error of the model output per squared relative error of the layer's.
        """
        weight = self.source.read(name, self.device)
        shape = weight.shape[0], weight.shape[1]
        known = self.calibration.layer_statistics(name.removesuffix(".weight")) or LayerStatistics()
        rows = known.validation_activations
        rows = None if rows is None else rows[:_MAX_ROWS].to(self.device, torch.float32)
        time = self.times.find(None, shape) if self.times else None
        options = [Option(self.source.tensors[name].nbytes, 0.0, time=time)]
        for format in self.candidates:
            if find_codec(format, shape) is None:  # a smaller group is a candidate of its own
                continue
            try:
                quantized, error = self._quantize(name, weight, format, known, rows)
            except NonFiniteWeightError:
                return options[:1]
            size = sum(tensor.nbytes for tensor in quantized.tensors(name.removesuffix(".weight")).values())
            time = self.times.find(quantized.codec, shape) if self.times else None
            options.append(Option(size, sensitivity * error**2, format, time))
        return options

    def _quantize(
        self, name: str, weight: torch.Tensor, format: FormatConfig, known: LayerStatistics, rows: torch.Tensor | None
    ) -> tuple[QuantizedWeight, float]:
        """The layer in one format, and the error of its output by the rounding of the run."""

        def quantize(statistics: LayerStatistics, rounding: RoundingConfig) -> tuple[QuantizedWeight, float]:
            made = quantize_layer(
                Layer(weight, statistics=statistics), format.codecs(weight.shape[1]), rounding, check=self.check
            )
            if rows is not None:
                return made, output_error(weight.float(), made, rows, self.capability)
            return made, made.weight_error if made.output_error is None else made.output_error

        if known.hessian is not None and format.codec.weight_bits < 8:
            return quantize(known, self.recipe.rounding)
        hessian = known.hessian if rows is None else None
        nearest, error = quantize(LayerStatistics(hessian), RoundingConfig("auto" if hessian is None else "nearest"))
        if known.hessian is None:
            return nearest, error
        key = re.sub(r"\d+", "*", name), tuple(weight.shape), format
        if key not in self._ratios:
            _, final = quantize(known, self.recipe.rounding)
            self._ratios[key] = final / error if error else 1.0
        return nearest, error * self._ratios[key]
