"""Scales: amax as the start, and a search that may only help."""

import math

import pytest
import torch

from learned_rounding.quant_core import quantize_weight
from learned_rounding.quant_core.errors import NonFiniteWeightError
from learned_rounding.quant_core.formats import make_codec
from learned_rounding.quant_core.rounding import amax_scale, search_scale, slabs
from learned_rounding.quant_core.rounding import scale_search as scales
from learned_rounding.tests.quant_core.rounding.targets import TARGETS, held_shape

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
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
    assert torch.isfinite(quantized.scale).all()
    assert (quantized.scale >= smallest).all()


KINDS = ["gaussian", "heavy tails", "outlier rows", "uniform", "sparse", "tiny", "huge", "small", "large"]


def assert_never_worse(weight_error, kind: str, format: str, granularity: str, shape: tuple[int, int], seed: int):
    weight = draw(kind, held_shape(format, shape), seed)
    plain = quantize_weight(weight, format, granularity=granularity, rounding="nearest")
    searched = quantize_weight(weight, format, granularity=granularity)
    if weight.any():
        assert weight_error(searched, weight) <= weight_error(plain, weight) * (1 + 1e-6)
    assert_usable(searched)
    assert torch.isfinite(searched.dequantize()).all()


def test_the_search_is_never_worse_than_nearest(subtests, weight_error):
    """Every format with every kind of weight, and every shape."""
    for number, (format, granularity) in enumerate(TARGETS):
        for index, kind in enumerate(KINDS):
            shape = SHAPES[(number + index) % len(SHAPES)]
            with subtests.test(kind, format=format, granularity=granularity, shape=shape):
                assert_never_worse(weight_error, kind, format, granularity, shape, seed=index)


@pytest.mark.soak
@pytest.mark.parametrize("kind", KINDS)
def test_the_search_is_never_worse_than_nearest_in_any_shape(subtests, weight_error, kind):
    for format, granularity in TARGETS:
        for seed, shape in enumerate(SHAPES * 2):
            with subtests.test(format, granularity=granularity, shape=shape, seed=seed):
                assert_never_worse(weight_error, kind, format, granularity, shape, seed)


def test_the_search_helps(subtests, weight_error):
    """Rare large weights stretch an INT8 scale; where the largest is within an FP8 octave is luck."""
    for format, granularity, columns, gain in (
        ("float8_e4m3fn", "tensor", 128, 0.98),
        ("int8_tensorwise", "row", 2048, 0.995),
        ("int8_tensorwise", "tensor", 2048, 0.95),
    ):
        weight = draw("gaussian", (64, columns), 0)
        weight[0, 0] = 6.5 * 0.02
        plain = quantize_weight(weight, format, granularity=granularity, rounding="nearest")
        searched = quantize_weight(weight, format, granularity=granularity)
        with subtests.test(format, granularity=granularity):
            assert weight_error(searched, weight) < gain * weight_error(plain, weight)


def search_ratio(format: str) -> torch.Tensor:
    weight = draw("gaussian", (64, 2048), 3)
    space = make_codec(format).solve_space((64, 2048))
    start, parent = amax_scale(weight, space)
    return search_scale(weight, start, parent, space)[0] / start


def test_the_search_looks_above_amax_for_fp8():
    ratio = search_ratio("float8_e4m3fn")
    assert ((ratio >= 1) & (ratio < 2)).all()
    assert (ratio != 1).any()


def test_the_search_looks_below_amax_for_int8():
    ratio = search_ratio("int8_tensorwise")
    assert ((ratio > 0.5) & (ratio <= 1)).all()
    assert (ratio != 1).any()


def test_a_sampled_search_is_never_worse_either(subtests, weight_error, monkeypatch):
    """The sample misses the rows that matter; the whole weight has the last word."""
    monkeypatch.setattr(scales, "_SAMPLE", 256)
    for format in ("float8_e4m3fn", "int8_tensorwise"):
        for seed in range(12):
            weight = draw("outlier rows", (96, 64), seed)
            plain = quantize_weight(weight, format, granularity="tensor", rounding="nearest")
            searched = quantize_weight(weight, format, granularity="tensor", seed=seed)
            with subtests.test(format, seed=seed):
                assert weight_error(searched, weight) <= weight_error(plain, weight) * (1 + 1e-6)


def test_the_seed_draws_the_sample(monkeypatch):
    monkeypatch.setattr(scales, "_SAMPLE", 512)  # one row of many
    weight = draw("gaussian", (64, 512), 0)
    first, again, *others = (
        quantize_weight(weight, "int8_tensorwise", granularity="tensor", seed=seed).scale.item()
        for seed in (0, 0, 1, 2, 3, 4, 5)
    )
    assert first == again
    assert {*others} != {first}


def raw(quantized) -> tuple[bytes, bytes]:
    return quantized.qdata.view(torch.uint8).numpy().tobytes(), quantized.scale.numpy().tobytes()


@pytest.fixture
def threads():
    """threads(count): number of torch's threads until the test ends."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("rounding", ["auto", "nearest"])
def test_the_same_weight_gives_the_same_bytes_on_any_number_of_threads(subtests, threads, rounding):
    for format, granularity in TARGETS:
        # Large enough for torch to share the work.
        weight = draw("heavy tails", held_shape(format, (256, 300)), 5).to(torch.bfloat16)
        results = []
        for count in (1, 2, 2):
            threads(count)
            results.append(raw(quantize_weight(weight, format, granularity=granularity, rounding=rounding, seed=1)))
        with subtests.test(format, granularity=granularity):
            assert len(set(results)) == 1


@pytest.mark.parametrize("rounding", ["auto", "nearest"])
def test_slabs_change_nothing(subtests, monkeypatch, rounding):
    for index, (format, granularity) in enumerate(TARGETS):
        weight = draw("outlier rows", held_shape(format, (19, 50)), 2)
        monkeypatch.setitem(slabs._SLAB, "cpu", 10**9)
        whole = quantize_weight(weight, format, granularity=granularity, rounding=rounding)
        for limit in {1, (50, 101, 19 * 50 - 1)[index % 3]}:
            monkeypatch.setitem(slabs._SLAB, "cpu", limit)
            parts = quantize_weight(weight, format, granularity=granularity, rounding=rounding)
            with subtests.test(format, granularity=granularity, limit=limit):
                assert torch.equal(parts.qdata.view(torch.uint8), whole.qdata.view(torch.uint8))
                assert torch.equal(parts.scale, whole.scale)
                assert parts.weight_error == pytest.approx(whole.weight_error, rel=1e-9)


@pytest.mark.parametrize("rounding", ["auto", "nearest"])
def test_zeros_get_a_usable_scale(subtests, rounding):
    for format, granularity in TARGETS:
        weight = torch.zeros(held_shape(format, (4, 8)))
        quantized = quantize_weight(weight, format, granularity=granularity, rounding=rounding)
        with subtests.test(format, granularity=granularity):
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


@pytest.mark.parametrize("rounding", ["auto", "nearest"])
def test_nan_and_inf_in_a_slab_between_others_are_refused(subtests, monkeypatch, rounding, sentences):
    monkeypatch.setitem(slabs._SLAB, "cpu", 16)
    bad = (float("nan"), float("inf"), -float("inf"))
    for index, (format, granularity) in enumerate(TARGETS):
        weight = draw("gaussian", held_shape(format, (9, 16)), 0).to(DTYPES[index % 3])
        weight[4, 7] = bad[index // 3 % 3]
        with subtests.test(format, granularity=granularity), sentences.raises(NonFiniteWeightError):
            quantize_weight(weight, format, granularity=granularity, rounding=rounding)


@pytest.mark.parametrize("rounding", ["auto", "nearest"])
def test_subnormal_weights_survive(subtests, rounding):
    for format, granularity in TARGETS:
        for dtype in DTYPES:
            smallest = torch.finfo(dtype).smallest_normal
            weight = (draw("uniform", held_shape(format, (8, 32)), 0).double() * smallest).to(dtype)
            quantized = quantize_weight(weight, format, granularity=granularity, rounding=rounding)
            with subtests.test(format, granularity=granularity, dtype=dtype):
                assert 0 < weight.abs().max() < smallest
                assert_usable(quantized)
                assert (quantized.dequantize().double() - weight.double()).norm() <= weight.double().norm()
                assert math.isfinite(quantized.weight_error)


def test_enormous_weights_survive(subtests):
    """Squares of them are beyond float32; the weights are not."""
    for format, granularity in TARGETS:
        weight = draw("gaussian", held_shape(format, (8, 32)), 0) * 2.0**120
        quantized = quantize_weight(weight, format, granularity=granularity)
        with subtests.test(format, granularity=granularity):
            assert_usable(quantized)
            assert torch.isfinite(quantized.dequantize()).all()
            assert math.isfinite(quantized.weight_error)


def test_weights_of_columns_move_the_scale():
    weight = draw("gaussian", (8, 512), 0)
    weight[:, 0] = 1.0  # an outlier column in every row
    space = make_codec("int8_tensorwise").solve_space((8, 512))
    start, parent = amax_scale(weight, space)
    only_others, only_outlier = torch.ones(512), torch.zeros(512)
    only_others[0], only_outlier[0] = 0, 1
    clipped, _ = search_scale(weight, start, parent, space, column_weight=only_others)
    kept, _ = search_scale(weight, start, parent, space, column_weight=only_outlier)
    assert (clipped < 0.7 * start).all()
    assert torch.equal(kept, start)


def test_weights_of_rows_move_a_shared_scale():
    weight = torch.cat([draw("gaussian", (8, 512), 0), torch.full((1, 512), 1.0)])
    space = make_codec("int8_tensorwise", "tensor").solve_space((9, 512))
    start, parent = amax_scale(weight, space)
    counts = torch.ones(9)
    kept, _ = search_scale(weight, start, parent, space, row_weight=counts)
    counts[8] = 0
    clipped, _ = search_scale(weight, start, parent, space, row_weight=counts)
    assert (clipped < 0.7 * start).all()
    assert torch.equal(kept, start)
