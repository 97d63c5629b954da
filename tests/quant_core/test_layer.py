"""quantize_weight: what it takes, what it refuses, and that it leaves its input alone."""

import pytest
import torch

from learned_rounding.quant_core import FORMATS, QuantizationError, quantize_weight
from learned_rounding.quant_core.errors import RecipeError, UnknownNameError
from learned_rounding.quant_core.rounding import slabs

TARGETS = [(name, granularity) for name, entry in FORMATS.items() for granularity in entry.granularities]


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("format, granularity", TARGETS)
def test_dtypes_that_hold_the_same_numbers_give_the_same_codes(format, granularity):
    half = (torch.randint(-200, 200, (16, 24), generator=torch.Generator().manual_seed(0)) / 128).to(torch.bfloat16)
    results = [
        quantize_weight(half.to(dtype), format, granularity=granularity)
        for dtype in (torch.bfloat16, torch.float16, torch.float32)
    ]
    for other in results[1:]:
        assert torch.equal(other.codes.view(torch.uint8), results[0].codes.view(torch.uint8))
        assert torch.equal(other.scale, results[0].scale) and other.weight_error == results[0].weight_error


@pytest.mark.parametrize("rounding", ["auto", "nearest"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("format, granularity", TARGETS)
def test_the_input_is_left_untouched(format, granularity, dtype, rounding):
    """float32 matters most: there ``.float()`` is no copy, and the grid uses what it is given as scratch."""
    weight = random(16, 24).to(dtype)
    before = weight.clone()
    quantize_weight(weight, format, granularity=granularity, rounding=rounding)
    assert torch.equal(weight, before)


def test_parameters_and_views_are_taken():
    weight = random(24, 16)
    expected = quantize_weight(weight.t().contiguous(), "int8_tensorwise")
    got = quantize_weight(torch.nn.Parameter(weight).t(), "int8_tensorwise")
    assert torch.equal(got.codes, expected.codes) and torch.equal(got.scale, expected.scale)
    assert not got.codes.requires_grad and not got.scale.requires_grad
    assert got.codes.is_contiguous()


@pytest.mark.parametrize(
    "weight",
    [
        torch.zeros(4),
        torch.zeros(0, 4),
        torch.zeros(4, 0),
        torch.zeros(2, 2, dtype=torch.int8),
        torch.tensor(1.0),
    ],
    ids=["vector", "no rows", "no columns", "integers", "scalar"],
)
def test_anything_but_a_matrix_of_floats_is_refused(weight):
    with pytest.raises(QuantizationError, match="non-empty matrix of float"):
        quantize_weight(weight, "int8_tensorwise")


def test_names_are_checked_first():
    with pytest.raises(UnknownNameError, match="format"):
        quantize_weight(random(2, 2), "int9")
    with pytest.raises(UnknownNameError, match="rounding"):
        quantize_weight(random(2, 2), "int8_tensorwise", rounding="nearst")
    with pytest.raises(UnknownNameError, match="granularity"):
        quantize_weight(random(2, 2), "int8_tensorwise", granularity="column")
    with pytest.raises(RecipeError, match="per tensor, not per row"):
        quantize_weight(random(2, 2), "float8_e4m3fn", granularity="row")


@pytest.mark.parametrize("rounding", ["auto", "nearest"])
@pytest.mark.parametrize("format, granularity", TARGETS)
def test_the_check_can_stop_it_at_any_call(monkeypatch, format, granularity, rounding):
    class Stop(Exception):
        pass

    monkeypatch.setitem(slabs._SLAB, "cpu", 64)
    weight = random(8, 64)
    total = 0

    def count():
        nonlocal total
        total += 1

    quantize_weight(weight, format, granularity=granularity, rounding=rounding, check=count)
    assert total >= 16  # once a slab, in both passes
    for last in (1, total // 2, total):
        calls = 0

        def stop(last=last):
            nonlocal calls
            calls += 1
            if calls == last:
                raise Stop

        with pytest.raises(Stop):
            quantize_weight(weight, format, granularity=granularity, rounding=rounding, check=stop)
        assert calls == last
