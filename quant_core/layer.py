"""One weight, start to end: rotation → scale → codes → never worse than nearest → bias → :class:`QuantizedWeight`."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from .calibration import Gram, Inputs, LowRankGram, PairedGram, dense_gram, mean_vector, quantized_grams
from .cancellation import CancelCheck
from .errors import QuantizationError, RecipeError
from .formats import INT8, Encoding, QuantizedWeight, make_encoding, rotation_groups
from .linalg import lapack
from .rounding import Quadratic, Rounder, RoundingConfig, correct_bias, make_objectives, synthetic_mean
from .sources.dtypes import SOURCE_DTYPES

__all__ = ["output_error", "quantize_weight"]

log = logging.getLogger(__name__)

# Dampings, relative to the mean of the diagonal, when weights make up for quantized inputs; held-out ones choose.
_COMPENSATION = (0.001, 0.01, 0.1, 1.0)
_PARTS = (1, 4, 16)  # of the rows, when a GPU's memory is short; then the CPU


def quantize_weight(
    weight: torch.Tensor,
    format: str,
    *,
    granularity: str | None = None,
    block_size: int | None = None,
    convrot: bool | int | str | None = None,
    full_precision_matmul: bool = False,
    gram: Gram | None = None,
    holdout_gram: Gram | None = None,
    output_weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    mean_input: torch.Tensor | None = None,
    input_scale: float | None = None,
    rounding: str = "auto",
    seed: int = 0,
    check: CancelCheck | None = None,
    **options,
) -> QuantizedWeight:
    """Quantize one weight on the device it lies on.

    Args:
        weight: (out, in), float16, bfloat16 or float32; left untouched. A convolution's (out, in, …) is taken as
            (out, −1); it can be quantized, but not stand in a file.
        format: key of :data:`FORMATS`.
        granularity: one of the format's granularities; None for its own.
        block_size: side of a block, for granularity block; None for 128.
        convrot: rotate the inputs: True by the largest group of 256, 64, 16 channels that divides them, a number by
            the largest up to it, "auto" by whichever group, or none, has the least error; that of quantized inputs
            counts too where some are held out.
        gram: H = XᵀX/tokens of the layer's inputs, (in, in), or another :data:`~.calibration.Gram`. With a
            :class:`~.calibration.PairedGram`, INT8 is rounded for inputs that are quantized too.
        holdout_gram: the Gram of other inputs, on which the result is judged.
        output_weight: float (out,), how much each output channel counts under ``gram``.
        bias, mean_input: (out,) and (in,), for the bias correction.
        input_scale: what ComfyUI shall divide the inputs by before it quantizes them; for float8_e4m3fn.
        rounding: key of :data:`~.rounding.ROUNDINGS`.
        seed: of all random draws.
        check: called often; raise in it to cancel.
        options: of the rounding, see :data:`~.rounding.OPTIONS`.

    Raises:
        NonFiniteWeightError: the weight holds NaN or Inf.
        CalibrationError: the Grams or the mean do not fit the weight, or are damaged.
        QuantizationError: the weight is empty or of another dtype.
        RecipeError: no such format, granularity, rounding or option, or one without effect.
    """
    method = RoundingConfig(rounding, **options).resolve(gram is not None)
    if weight.ndim < 2 or weight.numel() == 0 or weight.dtype not in SOURCE_DTYPES:
        raise QuantizationError(
            f"A weight of shape {tuple(weight.shape)} and dtype {weight.dtype} cannot be quantized: "
            "give a non-empty matrix of float16, bfloat16 or float32."
        )
    shape, matrix = tuple(weight.shape), weight.detach().flatten(1)
    encodings = [
        make_encoding(
            format, granularity, block_size=block_size, convrot=group, full_precision_matmul=full_precision_matmul
        )
        for group in rotation_groups(convrot, matrix.shape[1])
    ]
    if input_scale is not None and not (encodings[0].static_inputs and 0 < input_scale < float("inf")):
        raise RecipeError(f"An input scale of {input_scale} has no meaning for {encodings[0]}; leave it out.")
    inputs = Inputs(gram, holdout_gram, mean_input)
    layer = _Layer(matrix, inputs, bias, output_weight, method, seed, check)
    made = [layer.quantize(encoding) for encoding in encodings]
    best = min(made, key=layer.cost) if len(made) > 1 else made[0]
    return replace(best, shape=shape, input_scale=input_scale)


def output_error(weight: torch.Tensor, made: QuantizedWeight, rows: torch.Tensor) -> float:
    """‖X̂·Ŵᵀ − X·Wᵀ‖/‖X·Wᵀ‖ for inputs X, ``rows`` (tokens, in), as ComfyUI quantizes them; 0 where outputs are zero.

    ``weight``, ``rows``: float32, on one device.
    """
    expected = rows @ weight.t()
    got = made.encoding.quantize_inputs(rows) @ made.dequantize().to(rows).t()
    total = torch.linalg.vector_norm(expected, dtype=torch.float64)
    return float(torch.linalg.vector_norm(got - expected, dtype=torch.float64) / total) if total else 0.0


@dataclass(frozen=True)
class _Layer:
    """A weight (out, in) with all that decides how it is rounded."""

    weight: torch.Tensor
    inputs: Inputs
    bias: torch.Tensor | None
    output_weight: torch.Tensor | None
    method: RoundingConfig
    seed: int
    check: CancelCheck | None

    def quantize(self, encoding: Encoding) -> QuantizedWeight:
        """The best that is known for this encoding."""
        plain = self._alone(encoding)
        known = isinstance(self.inputs.gram, PairedGram) and self.inputs.holdout_rows is not None
        if not known or self.method.rounding != "calibrated" or encoding.quantized_inputs != (INT8, "token"):
            return plain
        try:
            return self._for_quantized_inputs(encoding, plain)
        except torch.OutOfMemoryError:
            if self.weight.device.type == "cpu":
                raise
        log.warning(
            "%s has too little free memory for a layer of shape %s to make up for its quantized inputs; it is calibrated "
            "without them.",
            self.weight.device,
            tuple(self.weight.shape),
        )
        torch.cuda.empty_cache()
        return plain

    def cost(self, made: QuantizedWeight) -> float:
        """What encodings are compared by: the error with quantized inputs if some are held out, else what is known."""
        rows = self.inputs.holdout_rows
        if rows is not None:
            return output_error(self.weight.float(), made, rows.to(self.weight.device, torch.float32))
        return made.weight_error if made.output_error is None else made.output_error

    def _alone(self, encoding: Encoding) -> QuantizedWeight:
        """As :meth:`_attempt`, and again with less memory or on the CPU whenever the device has too little."""
        for device, parts in self._ladder():
            try:
                return self._attempt(encoding, device, parts)
            except torch.OutOfMemoryError:
                if device.type == "cpu":
                    raise
            # Outside of the handler, so that the exception no longer holds the tensors of its frames.
            log.warning(
                "%s has too little free memory for a layer of shape %s in %d part(s); trying with less.",
                device,
                tuple(self.weight.shape),
                parts,
            )
            torch.cuda.empty_cache()
        raise AssertionError("the ladder ends on the CPU")

    def _ladder(self) -> Iterator[tuple[torch.device, int]]:
        device = self.weight.device
        if device.type != "cpu":
            divisible = self.method.rounding == "calibrated" and not self.method.gradient
            yield from ((device, parts) for parts in (_PARTS if divisible else _PARTS[:1]))
        yield torch.device("cpu"), 1

    def _attempt(self, encoding: Encoding, device: torch.device, parts: int) -> QuantizedWeight:
        weight = self.weight.to(device)
        shape = tuple(weight.shape)
        if encoding.rotation:
            weight = encoding.rotation.apply(weight)
        tiles = encoding.tiles(shape)
        row_weight = None if self.output_weight is None else self.output_weight.to(device, torch.float32)
        gram = self._gram(self.inputs.gram, encoding, device)

        def judge() -> Quadratic:
            held_out = self._gram(self.inputs.holdout_gram, encoding, device)
            return Quadratic(hessian=gram if held_out is None else held_out, row_weight=row_weight)

        known = not (gram is None and self.inputs.holdout_gram is None)
        rounder = Rounder(
            weight,
            encoding.format.grid,
            tiles,
            self.method,
            make_objectives(self.method, gram, row_weight, judged=self.inputs.holdout_gram is not None, seed=self.seed),
            judge=judge if known else None,
            parts=parts,
            seed=self.seed,
            check=self.check,
        )
        taken, rounded = rounder.round()
        mean, note = self._mean(shape[1], device)
        bias = self.bias
        if bias is not None and mean is not None:
            mean = encoding.rotation.apply(mean) if encoding.rotation else mean
            moved = correct_bias(bias.to(device), mean, weight, taken.codes, taken.scale, tiles, self.check)
            bias = moved.to(bias.device)
        home = self.weight.device
        scale = taken.scale.reshape(encoding.scale_shape(shape)).to(home)
        return QuantizedWeight(taken.codes.to(home), scale, encoding, replace(rounded, note=note), shape, bias)

    def _for_quantized_inputs(self, encoding: Encoding, plain: QuantizedWeight) -> QuantizedWeight:
        """``plain``, nearest, or what makes up for part of the error of INT8 inputs: whichever measures best with them.

        The last are the codes of W·XᵀX̂·(X̂ᵀX̂)⁻¹, which minimise ‖X·Wᵀ − X̂·Ŵᵀ‖; rotated inputs have too little error for it.
        """
        weight, rows = self.weight.float(), self.inputs.holdout_rows.to(self.weight.device, torch.float32)
        simple = replace(
            self, method=replace(self.method.uncalibrated(), rounding="nearest"), inputs=Inputs(mean=self.inputs.mean)
        )
        nearest = simple.quantize(encoding)
        made = [nearest, plain]
        if encoding.rotation is None:
            made.append(self._compensating(rows, encoding).quantize(encoding))
        errors = [output_error(weight, one, rows) for one in made]
        taken = made[errors.index(min(errors))]
        rounded = replace(
            taken.rounded,
            weight_error=float((taken.dequantize() - weight).norm() / weight.norm().clamp_min(1e-30)),
            output_error=min(errors),
            gain=min(errors) / errors[0] if errors[0] else 1.0,
            note="output errors hold those of the INT8 inputs",
        )
        return replace(taken, rounded=rounded)

    def _compensating(self, rows: torch.Tensor, encoding: Encoding) -> "_Layer":
        """The layer that, given X̂, comes nearest to what this one makes of X; ``rows`` are held-out X (tokens, in)."""
        weight, gram = self.weight.float(), self.inputs.gram
        inner, device = weight.shape[1], weight.device
        cross, seen = quantized_grams(gram, inner, device)
        reduced, wanted = encoding.quantize_inputs(rows), rows @ weight.t()

        def target_of(damping: float) -> torch.Tensor:
            ridge = damping * seen.diagonal().mean() * torch.eye(inner, device=device)
            return lapack(torch.linalg.solve, seen + ridge, (cross + ridge).t() @ weight.t()).t().contiguous()

        target = min(map(target_of, _COMPENSATION), key=lambda made: float((reduced @ made.t() - wanted).norm()))
        mean, mean_seen = gram.mean.to(device).split(inner)
        bias = self.bias
        if bias is not None and self.method.get("bias_correction") == "auto":
            bias = (bias.to(device).float() - target @ mean_seen + weight @ mean).to(bias)
        held_out = LowRankGram(reduced.t() / len(rows) ** 0.5, torch.zeros(inner))
        return replace(self, weight=target, inputs=Inputs(seen, held_out, mean_seen), bias=bias)

    def _gram(self, gram: Gram | None, encoding: Encoding, device: torch.device) -> torch.Tensor | None:
        if gram is None:
            return None
        dense = dense_gram(gram, self.weight.shape[1], device)
        return encoding.rotation.apply_gram(dense) if encoding.rotation else dense

    def _mean(self, inner: int, device: torch.device) -> tuple[torch.Tensor | None, str]:
        """x̄ for the bias correction, or None, and what a user should know about it."""
        wanted = self.method.get("bias_correction")
        if self.bias is None or wanted == "none":
            return None, ""
        if wanted == "synthetic":
            mean = synthetic_mean(inner, self.method.get("calib_samples"), self.seed, device)
            return mean, "bias corrected with a synthetic mean input, whose expectation is zero"
        return None if self.inputs.mean is None else mean_vector(self.inputs.mean, inner, device), ""
