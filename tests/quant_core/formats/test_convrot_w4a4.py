"""ConvRot W4A4: bytes as the description has them, and what comfy-kitchen makes and computes."""

import pytest
import torch

from learned_rounding.quant_core import quantize_weight
from learned_rounding.quant_core.formats import INT4, INT8, QuantizedWeight, make_codec
from learned_rounding.tests.quant_core.formats.weights import (
    HARD,
    correlated_hessian,
    parts_of,
    random,
    stored_values,
)


def quantize(weight: torch.Tensor, rounding: str = "nearest", **options) -> QuantizedWeight:
    return quantize_weight(weight, "convrot_w4a4", rounding=rounding, **options)


def read_value(parts, row: int, column: int) -> torch.Tensor:
    code = parts["weight"].view(torch.uint8)[row, column // 2].item() >> 4 * (column % 2) & 15
    return parts["weight_scale"][row] * (code if code < 8 else code - 16)


def test_each_value_is_at_the_byte_of_the_description(subtests):
    for make in HARD:
        made = quantize(make((12, 64)), "auto")
        parts = parts_of(made)
        values = torch.tensor([[read_value(parts, row, column) for column in range(64)] for row in range(12)])
        with subtests.test(make.__name__):
            assert torch.equal(values, stored_values(made))


def test_activations_are_int4_between_sm_7_5_and_9_0(subtests):
    codec = make_codec("convrot_w4a4", linear_dtype="int4", convrot=64)
    for capability, elements in (((7, 0), INT8), ((7, 5), INT4), ((8, 9), INT4), ((9, 0), INT8), (None, INT4)):
        with subtests.test(capability=capability):
            assert codec.activation_elements(capability) is elements


def test_activations_are_int8_by_default():
    assert make_codec("convrot_w4a4", convrot=64).activation_elements((8, 6)) is INT8


def test_layers_without_linear_dtype_are_those_of_int4():
    """As ComfyUI reads a layer's JSON that has no such key."""
    codec = make_codec("convrot_w4a4", convrot=64)
    read = type(codec).from_config(codec.format, {"convrot_groupsize": 64}, "row")
    assert read.linear_dtype == "int4"


def test_channels_that_are_no_multiple_of_64_are_refused():
    assert "are not a multiple of 64" in make_codec("convrot_w4a4", convrot=16).admits((8, 96))


def test_the_error_is_that_of_four_bits():
    """Relative error of Gaussian weights by round to nearest; the search lowers it."""
    weight = random((48, 3072))
    assert quantize(weight, "nearest").weight_error == pytest.approx(0.155, rel=0.02)
    assert quantize(weight, "auto").weight_error == pytest.approx(0.114, rel=0.02)


def test_gptq_lowers_the_output_error():
    nearest, calibrated = (
        quantize(random((48, 64)), rounding, hessian=correlated_hessian()).output_error
        for rounding in ("nearest", "calibrated")
    )
    assert calibrated < 0.75 * nearest


def test_nearest_equals_comfy_kitchen(subtests):
    """Rows of zeros have another scale there, and zeros as well."""
    kitchen = pytest.importorskip("comfy_kitchen.backends.eager.convrot_w4a4")
    shapes = ((32, 512), (20, 64), (130, 320))
    for index, make in enumerate(HARD):
        made = quantize(make(shapes[index % 3]))
        packed, scale = kitchen.quantize_signed_int4_rowwise(made.codec.rotation.apply(make(shapes[index % 3])))
        parts, filled = parts_of(made), made.qdata.any(1)
        with subtests.test(make.__name__):
            assert torch.equal(parts["weight"], packed)
            assert filled.any()
            assert torch.equal(parts["weight_scale"][filled], scale[filled])
            values = kitchen._unpack_int4_row_major(packed).float() * scale.reshape(-1, 1)
            assert torch.equal(values, stored_values(made))


@pytest.mark.parametrize("linear_dtype", ("int8", "int4"))
def test_outputs_equal_those_of_comfy_kitchen(subtests, linear_dtype):
    """Its function in plain torch computes INT4 for either dtype; INT8 is what its CUDA function calls, in plain torch."""
    kitchen = pytest.importorskip("comfy_kitchen.backends.eager.convrot_w4a4")
    int8_linear = pytest.importorskip("comfy_kitchen.backends.eager.quantization").int8_linear
    made, bias = quantize(random((96, 512)), linear_dtype=linear_dtype), random((96,), 6)
    parts, size = parts_of(made), made.codec.rotation.size
    weight, scale = parts["weight"], parts["weight_scale"]
    for dtype, tolerance in ((torch.float32, 1e-2), (torch.bfloat16, 6e-2)):
        x = random((40, 512), 5).to(dtype)
        if linear_dtype == "int4":
            expected = kitchen.convrot_w4a4_linear(x, weight, scale, bias.to(dtype), size).float()
        else:
            int8 = kitchen.prepare_int4_weight_for_int8_linear(weight)
            expected = int8_linear(x, int8, scale, bias, torch.float32, convrot=True, convrot_groupsize=size)
        output = torch.nn.functional.linear(made.codec.quantize_activations(x, (8, 6)), made.dequantize(), bias)
        with subtests.test(str(dtype)):
            assert (output - expected).norm() < tolerance * expected.norm()
