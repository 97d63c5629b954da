"""Round to nearest: error bounds that hold for every single weight."""

from itertools import product

import pytest
import torch

from learned_rounding.quant_core import quantize_weight
from learned_rounding.quant_core.formats import make_codec
from learned_rounding.quant_core.rounding import amax_scale, round_to_nearest
from learned_rounding.tests.quant_core.rounding.targets import TARGETS, held_shape

SHAPES = [(1, 1), (1, 300), (300, 1), (7, 13), (64, 96), (33, 127)]


def gaussian(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def test_int8_errs_by_half_a_step_at_most(subtests):
    for index, (shape, granularity) in enumerate(product(SHAPES, ("row", "tensor"))):
        weight = gaussian(*shape).to(DTYPES[index % 3])
        quantized = quantize_weight(weight, "int8_tensorwise", granularity=granularity, rounding="nearest")
        error = (quantized.qdata.double() * quantized.scale.double() - weight.double()).abs()
        with subtests.test(shape=shape, granularity=granularity, dtype=weight.dtype):
            assert (error <= quantized.scale.double() / 2 * (1 + 1e-5)).all()


def test_fp8_errs_by_half_a_unit_in_the_last_place_at_most(subtests):
    """e4m3: 2⁻⁴ of the value where it is normal (from 2⁻⁶ on), half the smallest subnormal 2⁻⁹ below."""
    for index, shape in enumerate(SHAPES):
        weight = gaussian(*shape).to(DTYPES[index % 3])
        quantized = quantize_weight(weight, "float8_e4m3fn", rounding="nearest")
        scale = quantized.scale.double()
        error = (quantized.qdata.double() * scale - weight.double()).abs()
        with subtests.test(shape=shape, dtype=weight.dtype):
            assert (error <= torch.maximum(weight.double().abs() * 2**-4, scale * 2**-10) * (1 + 1e-5)).all()


def test_the_largest_weight_becomes_the_largest_element(subtests):
    for format, granularity in (("float8_e4m3fn", "tensor"), ("int8_tensorwise", "row"), ("int8_tensorwise", "tensor")):
        quantized = quantize_weight(gaussian(5, 40), format, granularity=granularity, rounding="nearest")
        largest = quantized.qdata.float().abs()
        largest = largest.amax(dim=1) if granularity == "row" else largest.amax()
        with subtests.test(format, granularity=granularity):
            assert (largest == quantized.format.elements.max).all()


def test_representable_weights_are_exact(subtests):
    for format in ("float8_e4m3fn", "float8_e5m2", "int8_tensorwise"):
        codec = make_codec(format, "tensor")
        elements = codec.format.elements
        values = torch.arange(256, dtype=torch.int16).to(torch.uint8).view(elements.dtype).float()
        values = values[torch.isfinite(values) & (values.abs() <= elements.max)][:, None]
        space = codec.solve_space(tuple(values.shape))
        qdata, error = round_to_nearest(values * 0.125, amax_scale(values * 0.125, space)[0], space)
        with subtests.test(format):
            assert torch.equal(qdata.float(), values)
            assert error == 0


def test_the_reported_error_is_the_real_one(subtests, weight_error):
    """Every format with the smallest and largest magnitudes, and every magnitude."""
    magnitudes = (1e-24, 1e24, 1e-12, 1e-3, 1.0, 1e4, 1e18)
    for index, (format, granularity) in enumerate(TARGETS):
        for magnitude in {*magnitudes[:2], magnitudes[2 + index % 5]}:
            weight = gaussian(*held_shape(format, (24, 40))) * magnitude
            quantized = quantize_weight(weight, format, granularity=granularity)
            with subtests.test(format, granularity=granularity, magnitude=magnitude):
                assert quantized.weight_error == pytest.approx(weight_error(quantized, weight), rel=1e-4)
