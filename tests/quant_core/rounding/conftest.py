"""Weights and inputs whose directions matter, small enough for a CPU."""

from types import SimpleNamespace

import pytest
import torch


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def gaussian():
    """gaussian(*shape, seed=0) → float32."""
    return lambda *shape, seed=0: torch.randn(*shape, generator=_generator(seed))


@pytest.fixture
def anisotropic(gaussian):
    """anisotropic(inner, tokens=None, seed=0) → activations X with few strong directions, and their statistics.

    ``hessian`` comes from one half of the tokens, ``holdout`` and ``inputs`` from the other.
    """

    def make(inner: int, tokens: int | None = None, seed: int = 0):
        tokens = tokens or 6 * inner
        basis = torch.linalg.qr(gaussian(inner, inner, seed=seed + 100)).Q
        spectrum = torch.logspace(0, -2, inner)
        mean = gaussian(inner, seed=seed + 300) * 0.2
        inputs = [(gaussian(tokens, inner, seed=seed + half) * spectrum) @ basis + mean for half in (0, 1)]
        hessians = [x.t() @ x / tokens for x in inputs]
        means = [x.mean(dim=0) for x in inputs]
        return SimpleNamespace(hessian=hessians[0], holdout=hessians[1], mean=means[0], inputs=inputs[1])

    return make


@pytest.fixture
def output_error():
    """output_error(quantized, weight, hessian) → √(tr(E·H·Eᵀ)/tr(W·H·Wᵀ)) in float64."""

    def measure(quantized, weight: torch.Tensor, hessian: torch.Tensor) -> float:
        exact, h = weight.double(), hessian.double()
        error = quantized.dequantize().double() - exact
        return float((((error @ h) * error).sum() / ((exact @ h) * exact).sum()).sqrt())

    return measure
