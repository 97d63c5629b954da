"""Histogram of magnitudes, and the static FP8 input scale computed from it."""

import torch

from learned_rounding.quant_core.calibration import input_scale
from learned_rounding.quant_core.calibration.histogram import BINS, bin_centers, histogram


def gaussian(scale=1.0, count=200_000):
    return torch.randn(count, generator=torch.Generator().manual_seed(0)) * scale


def fp8_error(x, scale):
    quantized = (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float()
    return float((quantized * scale - x).norm() / x.norm())


def test_each_value_is_counted_in_its_bin():
    x = torch.tensor([0.0, 1e-30, 1.05, -1.05, 3.0, 1e30, float("inf"), float("nan")])
    counts, centers = histogram(x), bin_centers()
    assert counts.sum() == len(x)
    assert counts[0] == 2
    assert counts[-1] == 3
    for value, count in ((1.05, 2), (3.0, 1)):
        (index,) = ((centers / value).log2().abs() < 1 / 16 + 1e-6).nonzero().flatten().tolist()
        assert counts[index] == count
    assert len(counts) == BINS
    assert len(centers) == BINS
    assert (centers.diff() > 0).all()


def test_the_scale_is_within_3_percent_of_the_best(subtests):
    """Values that FP8 with scale 1 would flush to zero or clip."""
    for scale in [1e-3, 300.0, 1e4]:
        with subtests.test(scale=scale):
            x = gaussian(scale)
            chosen = input_scale(histogram(x), float(x.abs().max()))
            best = min(fp8_error(x, float(x.abs().max()) / 448 * 2 ** (-step / 4)) for step in range(-4, 24))
            assert fp8_error(x, chosen) < 1.03 * best < 0.9 * fp8_error(x, 1.0)


def test_no_scale_where_scale_1_is_as_good():
    x = gaussian()
    assert input_scale(histogram(x), float(x.abs().max())) is None


def test_no_scale_without_finite_activations():
    x = gaussian()
    assert input_scale(histogram(x[:0]), 0.0) is None
    assert input_scale(histogram(x), float("inf")) is None


def test_the_scale_is_not_subnormal():
    for amax in (1e-45, 1e-40, 1e-36, 1e-33, 1e-30):
        scale = input_scale(torch.ones(BINS), amax)
        assert scale is None or torch.tensor(scale) >= torch.finfo(torch.float32).tiny
    assert input_scale(torch.ones(BINS), 1e-30) is not None


def test_the_scale_has_headroom_where_that_costs_no_precision():
    x = gaussian(1000.0)
    amax = float(x.abs().max())
    assert input_scale(histogram(x), amax) > 1.4 * amax / 448


def test_one_outlier_does_not_reduce_the_precision_of_other_values():
    x = torch.cat([gaussian(1e-3), torch.tensor([1.0])])
    scale = input_scale(histogram(x), 1.0)
    assert fp8_error(x[:-1], scale) < 0.04
