"""What hurts: how far the model's own output moves when one layer's weight is disturbed as rounding disturbs it."""

import math
from collections.abc import Callable, Mapping

import torch

from ..cancellation import CancelCheck
from ..formats import E4M3

__all__ = ["Sensitivity"]


class Sensitivity:
    """Measures, layer by layer, what an error of the layer's output does to the output of the model.

    The disturbance is that of FP8 per tensor, rounded to nearest: D = Ŵ − W, added as x·Dᵀ to what the layer gives, so
    the model itself is left alone and may stream its weights as it likes. Errors are small, so what other formats cost
    follows in proportion.

    Args:
        layers: name → linear layer of the running model.
        read: name → its weight (out, in), any float dtype, on the device where the model runs.
        check: called before each layer; raise in it to cancel.
    """

    def __init__(
        self,
        layers: Mapping[str, torch.nn.Module],
        read: Callable[[str], torch.Tensor],
        check: CancelCheck,
    ):
        self._layers, self._read, self._check = dict(layers), read, check
        self._moved = dict.fromkeys(self._layers, 0.0)  # Σ of the relative squared errors of the model's output
        self._caused = dict.fromkeys(self._layers, 0.0)  # Σ of those of the layer's

    @torch.no_grad()
    def probe(self, run: Callable[[], torch.Tensor]) -> None:
        """Call the model once as it is and once with each layer disturbed; ``run`` must give the same every time."""
        exact = run().detach().float()
        total = float(exact.square().sum(dtype=torch.float64))
        if not 0 < total < math.inf:
            return
        for name, layer in self._layers.items():
            self._check()
            probe = _Probe(_rounding_error(self._read(name)))
            handle = layer.register_forward_hook(probe)
            try:
                moved = float((run().detach().float() - exact).square().sum(dtype=torch.float64)) / total
            finally:
                handle.remove()
            if probe.energy > 0 and math.isfinite(moved):
                self._moved[name] += moved
                self._caused[name] += probe.error / probe.energy

    @property
    def found(self) -> dict[str, float]:
        """Layer → relative squared error of the model's output per relative squared error of the layer's."""
        return {name: self._moved[name] / caused for name, caused in self._caused.items() if caused > 0}


class _Probe:
    """A hook that adds x·Dᵀ to a layer's output and sums up how much that is."""

    def __init__(self, disturbance: torch.Tensor):
        self._disturbance = disturbance
        self.error = self.energy = 0.0

    def __call__(self, layer: torch.nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
        x = args[0]
        error = torch.nn.functional.linear(x, self._disturbance.to(x))
        self.error += float(error.float().square().sum(dtype=torch.float64))
        self.energy += float(output.float().square().sum(dtype=torch.float64))
        return output + error.to(output)


def _rounding_error(weight: torch.Tensor) -> torch.Tensor:
    matrix = weight.float()
    scale = (matrix.abs().max() / E4M3.max).clamp_min(1e-30)
    return E4M3.encode(matrix / scale).float() * scale - matrix
