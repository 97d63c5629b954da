"""Quantize one layer: change of basis → scales → solver → never worse than round to nearest → bias → :class:`QuantizedWeight`."""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from .calibration import (
    Hessian,
    LayerStatistics,
    LowRankHessian,
    PairedHessian,
    dense_hessian,
    hessian_rms,
    low_rank_factor,
    mean_vector,
)
from .cancellation import CancelCheck
from .deprecated import renamed_keywords
from .errors import QuantizationError, RecipeError
from .formats import (
    INT8,
    LARGE_GROUP_SIZES,
    Codec,
    FormatConfig,
    QuantizedWeight,
    Rotation,
    Smoothing,
    Solution,
    SolveSpace,
)
from .layer import Layer, output_error
from .rounding import Quadratic, RoundingConfig, WeightSolver, correct_bias, recall, synthetic_mean
from .sources.dtypes import SOURCE_DTYPES

__all__ = ["quantize_layer", "quantize_weight"]

log = logging.getLogger(__name__)

_CLEARLY = 0.9  # error relative to that of a smaller ConvRot group, from which on a large one is worth its pass
_PARTS = (1, 4, 16)  # of the rows, tried in this order when a GPU is short of memory; then the CPU
_EXPONENTS = (0.0, 0.25, 0.5, 0.75)  # of smoothing that are tried; finer steps gain less than 0.3 % (measured)
_WORTHWHILE = 0.99  # error relative to that without smoothing, from which on it is worth a pass over the activations


@renamed_keywords(gram="hessian", holdout_gram="validation_hessian", mean_input="mean")
def quantize_weight(
    weight: torch.Tensor,
    format: str,
    *,
    granularity: str | None = None,
    block_size: int | None = None,
    convrot: bool | int | str | None = None,
    full_precision_matmul: bool = False,
    bits: int | None = None,
    linear_dtype: str | None = None,
    hessian: Hessian | None = None,
    validation_hessian: Hessian | None = None,
    mean: torch.Tensor | None = None,
    output_weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    input_scale: float | None = None,
    rounding: str = "auto",
    seed: int = 0,
    check: CancelCheck | None = None,
    **options,
) -> QuantizedWeight:
    """Quantize one weight on its device.

    Args:
        weight: (out, in), float16, bfloat16 or float32; left unchanged. A convolution's (out, in, …) is taken as
            (out, −1); it can be quantized, but not stored.
        format: key of :data:`FORMATS`.
        granularity: one of the format's; None for its default.
        block_size: side of a block, for granularity block; None for 128.
        convrot: rotate the activations: True by the largest group of 256, 64, 16 channels that divides them, a number by
            the largest up to it, "auto" by the group, or none, of least error, and groups of 1024 and 4096 where they reduce it
            by a tenth; with validation activations that error includes the error of quantized activations.
        full_precision_matmul: ask ComfyUI to dequantize the weight instead of multiplying quantized values.
        bits, linear_dtype: see :class:`FormatConfig`.
        hessian: H = XᵀX/n of the layer's activations, (in, in), or another :data:`~.calibration.Hessian`. With a
            :class:`~.calibration.PairedHessian`, INT8 weights also compensate the error of quantized activations.
        validation_hessian: of other activations, by which solutions are compared.
        mean: mean activation x̄ (in,), for the bias correction.
        output_weight: float (out,), weight of each output channel in the loss.
        bias: (out,), for the bias correction.
        input_scale: what ComfyUI divides the activations by before it quantizes them, for float8_e4m3fn.
        rounding: key of :data:`~.rounding.ROUNDINGS`.
        seed: of all random draws.
        check: called often; raise in it to cancel.
        options: of the rounding, see :data:`~.rounding.OPTIONS`.

    Raises:
        NonFiniteWeightError: the weight contains NaN or Inf.
        CalibrationError: the statistics do not fit the weight, or are damaged.
        QuantizationError: the weight is empty or of another dtype.
        RecipeError: no such format, granularity, rounding or option, or one without effect.
    """
    statistics, method = LayerStatistics(hessian, validation_hessian, mean), RoundingConfig(rounding, **options)
    if method.runs_model:
        raise RecipeError(f"Rounding '{rounding}' runs a whole model, which one weight is not; choose 'calibrated'.")
    if weight.ndim < 2 or weight.numel() == 0 or weight.dtype not in SOURCE_DTYPES:
        raise QuantizationError(
            f"A weight of shape {tuple(weight.shape)} and dtype {weight.dtype} cannot be quantized; "
            "give a non-empty matrix of float16, bfloat16 or float32."
        )
    matrix = weight.detach().flatten(1)
    config = FormatConfig(format, granularity, block_size, convrot, full_precision_matmul, bits, linear_dtype)
    codecs = config.codecs(matrix.shape[1])
    if input_scale is not None and not (codecs[0].static_activations and 0 < input_scale < float("inf")):
        raise RecipeError(f"An input scale of {input_scale} has no effect on {codecs[0]}; leave it out.")
    if method.smoothing and not codecs[0].format.smoothed_since:
        raise RecipeError(f"smoothing has no effect on {codecs[0]}; leave it out.")
    layer = Layer(matrix, bias, statistics, output_weight)
    quantized = quantize_layer(layer, codecs, method, input_scale=input_scale, seed=seed, check=check)
    return replace(quantized, shape=tuple(weight.shape))


def quantize_layer(
    layer: Layer,
    codecs: Sequence[Codec],
    rounding: RoundingConfig,
    *,
    input_scale: float | None = None,
    seed: int = 0,
    check: CancelCheck | None = None,
    cpu_fallback: bool = True,
) -> QuantizedWeight:
    """Quantize a layer with each of ``codecs`` and return the result of least error.

    Args:
        input_scale: static scale of the activations, for float8_e4m3fn; None for 1.
        seed: of all random draws.
        check: called often; raise in it to cancel.
        cpu_fallback: when the device has too little memory for parts of the rows, round on the CPU, or leave out what needs
            more; otherwise torch.OutOfMemoryError is raised.

    Raises:
        NonFiniteWeightError: the weight contains NaN or Inf.
        CalibrationError: the statistics do not fit the weight, or are damaged.
        QuantizationError: the format cannot hold the shape.
        RecipeError: the rounding needs a calibration, or an option of it has no effect.
    """
    shape = (layer.weight.shape[0], layer.weight.shape[1])
    if reason := codecs[0].admits(shape):
        raise QuantizationError(f"A weight of shape {shape} cannot be stored as {codecs[0]}: {reason}.")
    resolved = rounding.layerwise().resolve(layer.statistics.hessian is not None)
    run = _LayerRun(layer, resolved, seed, check, cpu_fallback)
    quantized = [run.quantize(codec) for codec in codecs]
    best = min(quantized, key=run.judge) if len(quantized) > 1 else quantized[0]
    return replace(best, input_scale=input_scale)


@dataclass(frozen=True)
class _LayerRun:
    """One layer with a resolved rounding."""

    layer: Layer
    rounding: RoundingConfig
    seed: int
    check: CancelCheck | None
    cpu_fallback: bool = True

    def quantize(self, codec: Codec) -> QuantizedWeight:
        """The best result for one codec."""
        plain = self._quantize_within_memory(codec)
        refine = self._refinement(codec)
        if refine is None:
            return plain
        try:
            return refine(codec, plain)
        except torch.OutOfMemoryError:
            if self.layer.weight.device.type == "cpu" or not self.cpu_fallback:
                raise
        log.warning(
            "%s has too little free memory to reduce the activations' error in a layer of shape %s; "
            "it is calibrated without.",
            self.layer.weight.device,
            tuple(self.layer.weight.shape),
        )
        torch.cuda.empty_cache()
        return plain

    def _refinement(self, codec: Codec) -> Callable[[Codec, QuantizedWeight], QuantizedWeight] | None:
        """What improves a calibrated result by the validation activations and their quantization; None where nothing does."""
        if self.rounding.rounding != "calibrated" or self.layer.validation_activations is None:
            return None
        paired = isinstance(self.layer.statistics.hessian, PairedHessian)
        if paired and codec.format.elements == INT8 and codec.format.activations == "token":
            return self._compensate
        return self._smooth if self.rounding.get("smoothing") and codec.format.smoothed_since else None

    def error(self, quantized: QuantizedWeight) -> float:
        """What codecs are compared by: the error with quantized activations if validation activations exist."""
        activations = self.layer.validation_activations
        if activations is not None:
            return output_error(self.layer.weight.float(), quantized, activations)
        return quantized.weight_error if quantized.output_error is None else quantized.output_error

    def judge(self, quantized: QuantizedWeight) -> float:
        """:meth:`error`, higher for ConvRot groups that take a pass of their own."""
        rotation = quantized.codec.rotation
        return self.error(quantized) / (_CLEARLY if rotation and rotation.size in LARGE_GROUP_SIZES else 1.0)

    def _compensate(self, codec: Codec, plain: QuantizedWeight) -> QuantizedWeight:
        """Round to nearest, ``plain``, or the compensated layer: the one of least error with quantized activations.

        Rotated activations have too little error left to compensate.
        """
        weight, activations = self.layer.weight.float(), self.layer.validation_activations
        assert activations is not None
        results = [self._round_nearest(codec), plain]
        if codec.rotation is None:
            correct = self.rounding.get("bias_correction") == "auto"
            results.append(replace(self, layer=self.layer.compensate(codec, correct_bias=correct)).quantize(codec))
        errors = [output_error(weight, result, activations) for result in results]
        best = results[errors.index(min(errors))]
        solution = replace(
            best.solution,
            weight_error=self._weight_error(best),
            output_error=min(errors),
            gain=min(errors) / errors[0] if errors[0] else 1.0,
        )
        return replace(best, solution=solution, note="output errors include those of the INT8 activations")

    def _smooth(self, codec: Codec, plain: QuantizedWeight) -> QuantizedWeight:
        """``plain``, or the smoothed layer where its error with quantized activations is smaller, and without not larger.

        The exponent is that of least error of round to nearest.
        """
        weight, activations = self.layer.weight.float(), self.layer.validation_activations
        hessian = self.layer.statistics.hessian
        assert activations is not None and hessian is not None
        rms = hessian_rms(hessian, weight.shape[1], weight.device)
        scales = [Smoothing.balance(weight, rms, exponent) for exponent in _EXPONENTS]
        codecs = [codec, *(replace(codec, smoothing=smoothing) for smoothing in scales)]
        cards = codec.format.native_since, (0, 0)  # that quantize activations, and that do not

        def errors_of(quantized: QuantizedWeight) -> list[float]:
            return [output_error(weight, quantized, activations, card) for card in cards]

        errors = [errors_of(self._round_nearest(each)) for each in codecs]
        best = min(range(len(codecs)), key=lambda index: max(errors[index]))
        if max(errors[best]) > _WORTHWHILE * max(errors[0]):
            return plain
        smoothed = self._quantize_within_memory(codecs[best])
        before, after = errors_of(plain), errors_of(smoothed)
        larger = any(new > old for new, old in zip(after, before, strict=True))
        if larger or max(after) > _WORTHWHILE * max(before):
            return plain
        gain = after[-1] / errors[0][-1] if errors[0][-1] else 1.0
        solution = replace(smoothed.solution, weight_error=self._weight_error(smoothed), gain=gain)
        note = f"activations smoothed with exponent {_EXPONENTS[best - 1]:g}"
        return replace(smoothed, solution=solution, note="; ".join(filter(None, (smoothed.note, note))))

    def _round_nearest(self, codec: Codec) -> QuantizedWeight:
        """The layer rounded to nearest."""
        uncalibrated = replace(self.layer, statistics=LayerStatistics(mean=self.layer.statistics.mean))
        nearest = replace(self.rounding.uncalibrated(), rounding="nearest")
        return replace(self, layer=uncalibrated, rounding=nearest).quantize(codec)

    def _weight_error(self, quantized: QuantizedWeight) -> float:
        """‖Ŵ − W‖/‖W‖ in the original basis."""
        weight = self.layer.weight.float()
        return float((quantized.dequantize() - weight).norm() / weight.norm().clamp_min(1e-30))

    def _quantize_within_memory(self, codec: Codec) -> QuantizedWeight:
        """:meth:`_quantize_on`, repeated with less memory, then on the CPU, while the device has too little."""
        attempts = list(self._attempts())
        for device, parts in attempts:
            try:
                return self._quantize_on(codec, device, parts)
            except torch.OutOfMemoryError:
                if (device, parts) == attempts[-1]:
                    raise
            # Outside of the handler, so that the exception no longer holds the tensors of its frames.
            if self.layer.memo is not None:
                self.layer.memo.clear()
            log.warning(
                "%s has too little free memory for a layer of shape %s in %d part(s); trying with less.",
                device,
                tuple(self.layer.weight.shape),
                parts,
            )
            torch.cuda.empty_cache()
        raise AssertionError("the last attempt returns or raises")

    def _attempts(self) -> Iterator[tuple[torch.device, int]]:
        device = self.layer.weight.device
        if device.type != "cpu":
            divisible = self.rounding.rounding == "calibrated" and not self.rounding.gradient
            yield from ((device, parts) for parts in (_PARTS if divisible else _PARTS[:1]))
        if device.type == "cpu" or self.cpu_fallback:
            yield torch.device("cpu"), 1

    def _quantize_on(self, codec: Codec, device: torch.device, parts: int) -> QuantizedWeight:
        """Quantize on a device, with the rows in ``parts`` parts."""
        layer, weight = self.layer, self.layer.weight.to(device)
        shape = (weight.shape[0], weight.shape[1])
        space = codec.solve_space(shape)
        if space.basis:
            weight = space.basis.apply_weight(weight)
        solver = WeightSolver(
            weight,
            space,
            self.rounding,
            hessian=self._hessian(layer.statistics.hessian, space, device),
            validation=lambda: self._validation(space, device),
            validated=layer.statistics.validation_hessian is not None,
            row_weight=None if layer.output_weight is None else layer.output_weight.to(device, torch.float32),
            parts=parts,
            memo=layer.memo,
            seed=self.seed,
            check=self.check,
        )
        solution = solver.solve()
        bias, note = self._correct_bias(weight, solution, space)
        return QuantizedWeight(solution.to(layer.weight.device), codec, shape, bias, note=note)

    def _hessian(self, hessian: Hessian | None, space: SolveSpace, device: torch.device) -> torch.Tensor | None:
        """The Hessian in the stored basis, float32 (in, in)."""
        if hessian is None:
            return None
        memo, basis = self.layer.memo, space.basis
        dense = recall(memo, hessian, device, lambda: dense_hessian(hessian, self.layer.weight.shape[1], device))
        if basis is None:
            return dense
        if isinstance(basis, Rotation):  # other bases are of one format
            return recall(memo, hessian, (device, basis), lambda: basis.apply_hessian(dense))
        return basis.apply_hessian(dense)

    def _validation(self, space: SolveSpace, device: torch.device) -> Quadratic | None:
        """The error of the output for the validation activations, in the stored basis."""
        hessian = self.layer.statistics.validation_hessian
        if not isinstance(hessian, LowRankHessian) or hessian.diagonal.any():
            dense = self._hessian(hessian, space, device)
            return None if dense is None else Quadratic(hessian=dense)
        factor = low_rank_factor(hessian, self.layer.weight.shape[1], device)
        return Quadratic(factor=space.basis.apply(factor.t()).t().contiguous() if space.basis else factor)

    def _correct_bias(
        self, weight: torch.Tensor, solution: Solution, space: SolveSpace
    ) -> tuple[torch.Tensor | None, str]:
        """The bias less E·x̄ where a mean is known, and a note for users; ``weight`` in the stored basis."""
        bias, wanted, note = self.layer.bias, self.rounding.get("bias_correction"), ""
        if bias is None or wanted == "none":
            return bias, note
        mean = self.layer.statistics.mean
        if wanted == "synthetic":
            mean = synthetic_mean(weight.shape[1], self.rounding.get("calib_samples"), self.seed, weight.device)
            note = "bias corrected with a synthetic mean activation, whose expectation is zero"
        elif mean is not None:
            mean = mean_vector(mean, weight.shape[1], weight.device)
        if mean is None:
            return bias, note
        mean = space.basis.apply(mean) if space.basis else mean
        corrected = correct_bias(
            bias.to(weight.device), mean, weight, solution.qdata, solution.scale, space, self.check
        )
        return corrected.to(bias.device), note
