"""One layer of a run as a task for any device, in the formats of one or several outputs."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from ..calibration import LayerStatistics, input_scale
from ..cancellation import CancelCheck
from ..errors import CalibrationError, NonFiniteWeightError
from ..events import Listener
from ..formats import QuantizedBank, QuantizedWeight
from ..layer import Layer
from ..quantize_bank import quantize_bank
from ..quantize_layer import quantize_layer
from ..recipes import Recipe
from ..rounding import MatrixMemo
from .memory import explain_layer_memory

__all__ = ["LayerOrder", "LayerResult", "LayerTask", "move_statistics", "quantize_ordered"]


@dataclass(frozen=True)
class LayerOrder:
    """What one output orders of a layer.

    Attributes:
        recipe: recipe of the output with the format of this layer.
        calibrated: the output uses the statistics.
        corrected: its bias may be corrected.
    """

    recipe: Recipe
    calibrated: bool
    corrected: bool


@dataclass(frozen=True)
class LayerResult:
    """A quantized layer without what its computation needed.

    Attributes:
        tensors: name → tensor, as in a file.
        config: JSON configuration of the layer.
        format, granularity, convrot, scale, solver, weight_error, gain, output_error, note: see
            :class:`~..events.LayerFinished`.
        bias_corrected: the bias among the tensors is another one than in the source.
        seconds: time of the computation in s.
    """

    tensors: Mapping[str, torch.Tensor]
    config: dict[str, object]
    format: str
    granularity: str
    convrot: int | None
    scale: tuple[float, float]
    solver: str
    weight_error: float
    gain: float | None
    output_error: float | None
    note: str
    bias_corrected: bool
    seconds: float = 0.0

    @classmethod
    def of(cls, layer: str, quantized: QuantizedWeight | QuantizedBank, bias: torch.Tensor | None) -> "LayerResult":
        """The result of a layer of base name ``layer``; ``bias``: that of the source."""
        codec = quantized.codec
        return cls(
            tensors=quantized.tensors(layer),
            config=quantized.config,
            format=codec.format.name,
            granularity=codec.granularity,
            convrot=codec.rotation and codec.rotation.size,
            scale=quantized.scale_range,
            solver=quantized.solver,
            weight_error=quantized.weight_error,
            gain=quantized.gain,
            output_error=quantized.output_error,
            note=quantized.note,
            bias_corrected=quantized.bias is not bias,
        )


@dataclass(frozen=True)
class LayerTask:
    """A :class:`~..workers.Task`: quantize one weight, or bank of experts, once for each order.

    Attributes:
        name: name of the layer.
        weight: (out, in), or (experts, out, in).
        bias: bias that may be corrected, None without.
        statistics: of the activations; None without a calibration.
        orders: what each output orders.
    """

    name: str
    weight: torch.Tensor
    bias: torch.Tensor | None
    statistics: LayerStatistics | None
    orders: Sequence[LayerOrder]

    @property
    def title(self) -> str:
        return f"layer {self.name}"

    def load(self, device: torch.device) -> "LayerTask":
        """The task with the weight and the Hessian on a device; experts of a bank go there one by one."""
        weight = self.weight if self.weight.ndim == 3 else self.weight.to(device)
        return replace(self, weight=weight, statistics=self.statistics and move_statistics(self.statistics, device))

    def run(
        self, device: torch.device, emit: Listener, check: CancelCheck, *, cpu_fallback: bool
    ) -> list[LayerResult | NonFiniteWeightError]:
        """The result of each order.

        Raises:
            CalibrationError: the statistics do not fit the weight, or are damaged.
            OutOfMemoryError: the device has too little memory.
        """
        with explain_layer_memory(device, self.name, self.weight.shape):
            task = self.load(device)  # once for all orders
        memo = MatrixMemo(device) if len(self.orders) > 1 else None
        results: list[LayerResult | NonFiniteWeightError] = []
        for order in self.orders:
            began = time.perf_counter()
            try:
                _, quantized = quantize_ordered(task, order, device, check, memo, cpu_fallback=cpu_fallback)
            except NonFiniteWeightError as error:
                results.append(error)
                continue
            made = LayerResult.of(self.name, quantized, self.bias if order.corrected else None)
            results.append(replace(made, seconds=time.perf_counter() - began))
        return results


def quantize_ordered(
    task: LayerTask,
    order: LayerOrder,
    device: torch.device,
    check: CancelCheck,
    memo: MatrixMemo | None = None,
    *,
    cpu_fallback: bool = True,
) -> tuple[Layer | None, QuantizedWeight | QuantizedBank]:
    """The layer and its result for one order; None for the layer of a bank. ``memo``: of all orders of the task.

    Raises:
        NonFiniteWeightError: the weight contains NaN or Inf.
        CalibrationError, OutOfMemoryError: as :meth:`LayerTask.run`.
    """
    statistics = task.statistics if order.calibrated and task.statistics is not None else LayerStatistics()
    rounding = order.recipe.rounding
    if order.calibrated and statistics.hessian is None:
        rounding = rounding.uncalibrated()
    bias, format = task.bias if order.corrected else None, order.recipe.format
    try:
        with explain_layer_memory(device, task.name, task.weight.shape):
            if task.weight.ndim == 3:
                codec = format.codec_for(task.weight.shape[-1])
                return None, quantize_bank(
                    task.weight,
                    bias,
                    statistics,
                    codec,
                    rounding,
                    device=device,
                    seed=order.recipe.seed,
                    check=check,
                    cpu_fallback=cpu_fallback,
                )
            layer = Layer(task.weight.to(device), bias, statistics, memo=memo)
            return layer, quantize_layer(
                layer,
                format.codecs(task.weight.shape[1]),
                rounding,
                input_scale=_static_input_scale(order.recipe, statistics),
                seed=order.recipe.seed,
                check=check,
                cpu_fallback=cpu_fallback,
            )
    except CalibrationError as error:
        raise CalibrationError(f"{task.name}: {error}", tensor=f"{task.name}.weight") from error


def move_statistics(statistics: LayerStatistics, device: torch.device) -> LayerStatistics:
    """The statistics with the Hessian on a device, where its memory is large enough."""
    try:
        return statistics.move_hessian(device)
    except torch.OutOfMemoryError:
        return statistics


def _static_input_scale(recipe: Recipe, statistics: LayerStatistics) -> float | None:
    """Static scale of the input activations, if the format has one and the calibration the statistics for it."""
    if statistics.histogram is None or statistics.amax is None or not recipe.format.codec.static_activations:
        return None
    return input_scale(statistics.histogram, float(statistics.amax.max()))
