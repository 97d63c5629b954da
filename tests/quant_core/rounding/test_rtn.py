"""Round to nearest: error bounds that hold for every single weight."""

import pytest
import torch

from learned_rounding.quant_core import quantize_weight
from learned_rounding.quant_core.formats import make_codec
from learned_rounding.quant_core.rounding import amax_scale, round_to_nearest
from learned_rounding.tests.quant_core.rounding.targets import TARGETS, held_shape

SHAPES = [(1, 1), (1, 300), (300, 1), (7, 13), (64, 96), (33, 127)]


def gaussian(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("granularity", ["row", "tensor"])
@pytest.mark.parametrize("shape", SHAPES)
def test_int8_errs_by_half_a_step_at_most(shape, granularity, dtype):
    weight = gaussian(*shape).to(dtype)
    quantized = quantize_weight(weight, "int8_tensorwise", granularity=granularity, rounding="nearest")
    error = (quantized.qdata.double() * quantized.scale.double() - weight.double()).abs()
    assert (error <= quantized.scale.double() / 2 * (1 + 1e-5)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_fp8_errs_by_half_a_unit_in_the_last_place_at_most(shape, dtype):
    """e4m3: 2⁻⁴ of the value where it is normal (from 2⁻⁶ on), half the smallest subnormal 2⁻⁹ below."""
    weight = gaussian(*shape).to(dtype)
    quantized = quantize_weight(weight, "float8_e4m3fn", rounding="nearest")
    scale = quantized.scale.double()
    error = (quantized.qdata.double() * scale - weight.double()).abs()
    assert (error <= torch.maximum(weight.double().abs() * 2**-4, scale * 2**-10) * (1 + 1e-5)).all()


@pytest.mark.parametrize(
    "format, granularity", [("float8_e4m3fn", "tensor"), ("int8_tensorwise", "row"), ("int8_tensorwise", "tensor")]
)
def test_the_largest_weight_becomes_the_largest_element(format, granularity):
    weight = gaussian(5, 40)
    quantized = quantize_weight(weight, format, granularity=granularity, rounding="nearest")
    end = quantized.format.elements.max
    largest = quantized.qdata.float().abs()
    assert (largest.amax(dim=1) == end).all() if granularity == "row" else largest.amax() == end


@pytest.mark.parametrize("format", ["float8_e4m3fn", "float8_e5m2", "int8_tensorwise"])
def test_representable_weights_are_exact(format):
    codec = make_codec(format, "tensor")
    elements = codec.format.elements
    values = torch.arange(256, dtype=torch.int16).to(torch.uint8).view(elements.dtype).float()
    values = values[torch.isfinite(values) & (values.abs() <= elements.max)][:, None]
    space = codec.solve_space(tuple(values.shape))
    qdata, error = round_to_nearest(values * 0.125, amax_scale(values * 0.125, space)[0], space)
    assert torch.equal(qdata.float(), values) and error == 0


@pytest.mark.parametrize("format, granularity", TARGETS)
@pytest.mark.parametrize("magnitude", [1e-24, 1e-12, 1e-3, 1.0, 1e4, 1e18, 1e24])
def test_the_reported_error_is_the_real_one(weight_error, format, granularity, magnitude):
    weight = gaussian(*held_shape(format, (24, 40))) * magnitude
    quantized = quantize_weight(weight, format, granularity=granularity)
    assert quantized.weight_error == pytest.approx(weight_error(quantized, weight), rel=1e-4)
