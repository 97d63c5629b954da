"""Sensitivity analysis: error of the model's output caused by a quantization error in a single layer."""

import math
from collections.abc import Callable, Mapping

import torch

from ..cancellation import CancelCheck
from ..formats import E4M3

__all__ = ["SensitivityAnalysis"]


class SensitivityAnalysis:
    """Measure, layer by layer, how a quantization error of the layer's weight changes the model's output.

    The perturbation is D = Ŵ − W of E4M3 per tensor, round to nearest. A forward hook adds x·Dᵀ to the layer's output,
    so the weights are not modified and may be streamed. Errors are small, so the model's error is taken as proportional
    to the layer's error for other formats.

    Args:
        layers: name → linear layer of the running model.
        read: name → its weight (out, in), any float dtype, on the device of the model.
        check: called before each layer; raise in it to cancel.
    """

    def __init__(
        self,
        layers: Mapping[str, torch.nn.Module],
        read: Callable[[str], torch.Tensor],
        check: CancelCheck,
    ):
        self._layers, self._read, self._check = dict(layers), read, check
        self._model_error = dict.fromkeys(self._layers, 0.0)  # Σ of relative squared errors of the model's output
        self._layer_error = dict.fromkeys(self._layers, 0.0)  # Σ of relative squared errors of the layer's output
        self._steps: dict[str, list[tuple[float, float]]] = {name: [] for name in self._layers}

    @torch.no_grad()
    def probe(self, run: Callable[[], torch.Tensor], position: float | None = None) -> None:
        """Run the model once unmodified and once per perturbed layer.

        Args:
            run: calls the model and returns its output; must be deterministic. Outputs that are zero or not finite
                are skipped.
            position: position of the call in a run of the sampler, 0…1; None where there are no steps.
        """
        reference = run().detach().float()
        energy = float(reference.square().sum(dtype=torch.float64))
        if not 0 < energy < math.inf:
            return
        for name, layer in self._layers.items():
            self._check()
            perturbation = _Perturbation(_rounding_error(self._read(name)))
            handle = layer.register_forward_hook(perturbation)
            try:
                error = float((run().detach().float() - reference).square().sum(dtype=torch.float64)) / energy
            finally:
                handle.remove()
            if perturbation.energy > 0 and math.isfinite(error):
                self._model_error[name] += error
                layer_error = perturbation.error / perturbation.energy
                self._layer_error[name] += layer_error
                if position is not None and layer_error > 0:
                    self._steps[name].append((position, error / layer_error))

    @property
    def sensitivities(self) -> dict[str, float]:
        """Layer → relative squared error of the model's output per relative squared error of the layer's output."""
        return {name: self._model_error[name] / error for name, error in self._layer_error.items() if error > 0}

    @property
    def step_sensitivities(self) -> dict[str, tuple[tuple[float, float], ...]]:
        """Layer → (position, sensitivity) of each probe that had a position."""
        return {name: tuple(steps) for name, steps in self._steps.items() if steps}


class _Perturbation:
    """Forward hook that adds x·Dᵀ to a layer's output; sums the squares of the added error and of the output."""

    def __init__(self, difference: torch.Tensor):
        self._difference = difference
        self.error = self.energy = 0.0

    def __call__(self, layer: torch.nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
        x = args[0]
        error = torch.nn.functional.linear(x, self._difference.to(x))
        self.error += float(error.float().square().sum(dtype=torch.float64))
        self.energy += float(output.float().square().sum(dtype=torch.float64))
        return output + error.to(output)


def _rounding_error(weight: torch.Tensor) -> torch.Tensor:
    matrix = weight.float()
    scale = (matrix.abs().max() / E4M3.max).clamp_min(1e-30)
    return E4M3.encode(matrix / scale).float() * scale - matrix
