"""Hessian accumulators against XᵀX/n of the same activations."""

import torch

from learned_rounding.quant_core.calibration import dense_hessian
from learned_rounding.quant_core.calibration.accumulate import LowRankHessianAccumulator

CPU = torch.device("cpu")


def test_low_rank_hessian_resolves_all_channels_besides_an_outlier_channel():
    """An outlier channel, 1000 times as large as the others, does not reduce the precision of the others."""
    activations = torch.randn(600, 128, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 129) ** -0.7
    basis = torch.linalg.qr(torch.randn(128, 128, generator=torch.Generator().manual_seed(1)))[0]
    activations = activations @ basis
    activations[:, 5] *= 1000
    accumulator = LowRankHessianAccumulator(128, 16, CPU)
    for batch in activations.split(200):
        accumulator.add(batch)
    others = torch.arange(128) != 5
    exact = activations.t() @ activations / 600
    hessian, expected = (matrix[others][:, others] for matrix in (dense_hessian(accumulator.result(), 128, CPU), exact))
    assert (hessian - expected).norm() / expected.norm() < 0.2
