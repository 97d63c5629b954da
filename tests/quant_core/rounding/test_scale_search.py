"""Scales: amax as the start, and a search that may only help."""

import math

import pytest
import torch

from learned_rounding.quant_core import quantize_weight
from learned_rounding.quant_core.errors import NonFiniteWeightError
from learned_rounding.quant_core.formats import make_codec
from learned_rounding.quant_core.rounding import amax_scale, round_to_nearest, search_scale, slabs
from learned_rounding.quant_core.rounding import scale_search as scales
from learned_rounding.quant_core.rounding.scaling import search_scaling
from learned_rounding.tests.quant_core.rounding.targets import TARGETS, held_shape, start

SHAPES = [(1, 257), (257, 1), (1, 1), (3, 5), (40, 64), (31, 97)]


def draw(kind: str, shape: tuple[int, int], seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(shape, generator=generator)
    if kind == "gaussian":
        return normal * 0.02
    if kind == "heavy tails":  # Student's t with about two degrees of freedom
        return normal / torch.randn(shape, generator=generator).abs().clamp_min(1e-3).sqrt()
    if kind == "outlier rows":
        return normal * torch.where(torch.rand(shape[0], 1, generator=generator) < 0.1, 50.0, 0.01)
    if kind == "uniform":
        return torch.rand(shape, generator=generator) - 0.5
    if kind == "sparse":
        return normal * (torch.rand(shape, generator=generator) < 0.05)
    return normal * {"tiny": 1e-30, "huge": 1e30, "small": 1e-7, "large": 1e5}[kind]


def assert_usable(quantized) -> None:
    """Scales are finite; they are positive, or 0 in formats where that stands for a group of zeros."""
    smallest = torch.finfo(torch.float32).smallest_normal if quantized.codec.scales.continuous else 0
    assert torch.isfinite(quantized.scale).all() and (quantized.scale >= smallest).all()


KINDS = ["gaussian", "heavy tails", "outlier rows", "uniform", "sparse", "tiny", "huge", "small", "large"]


@pytest.mark.parametrize("format, granularity", TARGETS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_search_is_never_worse_than_nearest(weight_error, kind, format, granularity):
    for seed, shape in enumerate(SHAPES * 2):
        weight = draw(kind, held_shape(format, shape), seed)
        plain = quantize_weight(weight, format, granularity=granularity, rounding="nearest")
        searched = quantize_weight(weight, format, granularity=granularity)
        if weight.any():
            assert weight_error(searched, weight) <= weight_error(plain, weight) * (1 + 1e-6), (shape, seed)
        assert_usable(searched)
        assert torch.isfinite(searched.dequantize()).all()


@pytest.mark.parametrize(
    "format, granularity, columns, gain",
    [
        ("float8_e4m3fn", "tensor", 128, 0.98),
        ("int8_tensorwise", "row", 2048, 0.995),
        ("int8_tensorwise", "tensor", 2048, 0.95),
    ],
)
def test_the_search_helps(weight_error, format, granularity, columns, gain):
    """Rare large weights stretch an INT8 scale; where the largest falls within an FP8 octave is luck."""
    weight = draw("gaussian", (64, columns), 0)
    weight[0, 0] = 6.5 * 0.02
    plain = quantize_weight(weight, format, granularity=granularity, rounding="nearest")
    searched = quantize_weight(weight, format, granularity=granularity)
    assert weight_error(searched, weight) < gain * weight_error(plain, weight)


def test_the_search_looks_above_amax_for_fp8_and_below_for_int8():
    weight = draw("gaussian", (64, 2048), 3)
    for format in ("float8_e4m3fn", "int8_tensorwise"):
        space = make_codec(format).solve_space((64, 2048))
        start, parent = amax_scale(weight, space)
        ratio = search_scale(weight, start, parent, space)[0] / start
        assert ((ratio >= 1) & (ratio < 2)).all() if space.elements.floating else ((ratio > 0.5) & (ratio <= 1)).all()
        assert (ratio != 1).any()


@pytest.mark.parametrize("format", ["float8_e4m3fn", "int8_tensorwise"])
def test_a_sampled_search_is_never_worse_either(weight_error, monkeypatch, format):
    """The sample misses the rows that matter; the whole weight has the last word."""
    monkeypatch.setattr(scales, "_SAMPLE", 256)
    for seed in range(12):
        weight = draw("outlier rows", (96, 64), seed)
        plain = quantize_weight(weight, format, granularity="tensor", rounding="nearest")
        searched = quantize_weight(weight, format, granularity="tensor", seed=seed)
        assert weight_error(searched, weight) <= weight_error(plain, weight) * (1 + 1e-6), seed


def test_the_seed_draws_the_sample(monkeypatch):
    monkeypatch.setattr(scales, "_SAMPLE", 512)  # one row of many
    weight = draw("gaussian", (64, 512), 0)
    found = [
        quantize_weight(weight, "int8_tensorwise", granularity="tensor", seed=seed).scale.item()
        for seed in (0, 0, 1, 2, 3, 4, 5)
    ]
    assert found[0] == found[1]
    assert len(set(found)) > 1


@pytest.mark.parametrize("format, granularity", TARGETS)
@pytest.mark.parametrize("rounding", ["auto", "nearest"])
def test_the_same_weight_gives_the_same_bytes_on_any_number_of_threads(format, granularity, rounding):
    weight = draw("heavy tails", held_shape(format, (400, 300)), 5).to(
        torch.bfloat16
    )  # large enough for torch to share the work
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 2, 1):
            torch.set_num_threads(threads)
            quantized = quantize_weight(weight, format, granularity=granularity, rounding=rounding, seed=1)
            results.append((quantized.qdata.view(torch.uint8).numpy().tobytes(), quantized.scale.numpy().tobytes()))
    finally:
        torch.set_num_threads(before)
    assert len(set(results)) == 1


@pytest.mark.parametrize("format, granularity", TARGETS)
@pytest.mark.parametrize("rounding", ["auto", "nearest"])
def test_slabs_change_nothing(monkeypatch, format, granularity, rounding):
    weight = draw("outlier rows", held_shape(format, (37, 50)), 2)
    whole = quantize_weight(weight, format, granularity=granularity, rounding=rounding)
    for limit in (1, 50, 101, 37 * 50 - 1):
        monkeypatch.setitem(slabs._SLAB, "cpu", limit)
        parts = quantize_weight(weight, format, granularity=granularity, rounding=rounding)
        assert torch.equal(parts.qdata.view(torch.uint8), whole.qdata.view(torch.uint8))
        assert torch.equal(parts.scale, whole.scale)
        assert parts.weight_error == pytest.approx(whole.weight_error, rel=1e-9)


@pytest.mark.parametrize("format, granularity", TARGETS)
@pytest.mark.parametrize("rounding", ["auto", "nearest"])
def test_zeros_get_a_usable_scale(format, granularity, rounding):
    quantized = quantize_weight(
        torch.zeros(held_shape(format, (4, 8))), format, granularity=granularity, rounding=rounding
    )
    assert_usable(quantized)
    assert not quantized.qdata.float().any()
    assert quantized.weight_error == 0


def test_a_zero_row_beside_others_gets_a_usable_scale(weight_error):
    weight = draw("gaussian", (4, 64), 0)
    weight[2] = 0
    quantized = quantize_weight(weight, "int8_tensorwise")
    assert_usable(quantized)
    assert not quantized.qdata[2].any()
    assert math.isclose(quantized.weight_error, weight_error(quantized, weight), rel_tol=1e-4)


@pytest.mark.parametrize("format, granularity", TARGETS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("rounding", ["auto", "nearest"])
def test_nan_and_inf_are_refused(monkeypatch, format, granularity, dtype, bad, rounding, sentences):
    monkeypatch.setitem(slabs._SLAB, "cpu", 16)  # the bad one lies in neither the first nor the last slab
    weight = draw("gaussian", held_shape(format, (9, 16)), 0).to(dtype)
    weight[4, 7] = bad
    with sentences.raises(NonFiniteWeightError):
        quantize_weight(weight, format, granularity=granularity, rounding=rounding)


@pytest.mark.parametrize("format, granularity", TARGETS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("rounding", ["auto", "nearest"])
def test_subnormal_weights_survive(format, granularity, dtype, rounding):
    smallest = torch.finfo(dtype).smallest_normal
    weight = (draw("uniform", held_shape(format, (8, 32)), 0).double() * smallest).to(dtype)
    assert weight.any() and (weight.abs() < smallest).all()
    quantized = quantize_weight(weight, format, granularity=granularity, rounding=rounding)
    assert_usable(quantized)
    assert (quantized.dequantize().double() - weight.double()).norm() <= weight.double().norm()
    assert math.isfinite(quantized.weight_error)


@pytest.mark.parametrize("format, granularity", TARGETS)
def test_enormous_weights_survive(format, granularity):
    """Squares of them are beyond float32; the weights are not."""
    weight = draw("gaussian", held_shape(format, (8, 32)), 0) * 2.0**120
    quantized = quantize_weight(weight, format, granularity=granularity)
    assert_usable(quantized)
    assert torch.isfinite(quantized.dequantize()).all()
    assert math.isfinite(quantized.weight_error)


@pytest.mark.parametrize("format, granularity", TARGETS)
def test_the_search_minimises_what_it_says(format, granularity):
    """The gain is the ratio of the weighted errors, of the chosen scale and of the start."""
    weight = draw("heavy tails", (40, 96), 1)
    columns, rows = torch.rand(96, generator=torch.Generator().manual_seed(2)), torch.linspace(0.1, 5, 40)

    def error(scaling):
        qdata, _ = round_to_nearest(weight, scaling.scale, scaling.space)
        lost = scaling.space.decode(qdata, scaling.scale) - weight
        return float((lost.double().square() * columns * rows[:, None]).sum().sqrt())

    before = start(weight, format, granularity)
    after, gain = search_scaling(weight, before, column_weight=columns, row_weight=rows)
    assert gain == pytest.approx(error(after) / error(before), rel=1e-4)
    assert gain <= 1
    few = before.space.groups.counts == (1, 1) or format == "mxfp8"  # one scale, or two candidates for each
    assert few or gain < 1


def test_weights_of_columns_and_rows_move_the_scale():
    weight = draw("gaussian", (8, 512), 0)
    weight[:, 0] = 1.0  # an outlier column in every row
    space = make_codec("int8_tensorwise").solve_space((8, 512))
    start, parent = amax_scale(weight, space)
    only_others, only_outlier = torch.ones(512), torch.zeros(512)
    only_others[0], only_outlier[0] = 0, 1
    clipped, _ = search_scale(weight, start, parent, space, column_weight=only_others)
    kept, _ = search_scale(weight, start, parent, space, column_weight=only_outlier)
    assert (clipped < 0.7 * start).all() and torch.equal(kept, start)
