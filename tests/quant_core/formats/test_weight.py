"""A quantized weight in a file: names, dtypes, shapes and the bytes of its JSON."""

import pytest
import torch

from learned_rounding.quant_core import QuantizationError, quantize_weight

# format, options, dtype of the quantized values, shape of the scale, JSON
FP8, INT = torch.float8_e4m3fn, torch.int8
FULL = {"full_precision_matmul": True}
CASES = [
    ("float8_e4m3fn", {}, FP8, (), '{"format":"float8_e4m3fn"}'),
    ("float8_e4m3fn", FULL, FP8, (), '{"format":"float8_e4m3fn","full_precision_matrix_mult":true}'),
    ("float8_e5m2", {}, torch.float8_e5m2, (), '{"format":"float8_e5m2","full_precision_matrix_mult":true}'),
    ("float8_e4m3fn_rowwise", {}, FP8, (6, 1), '{"format":"float8_e4m3fn_rowwise"}'),
    ("float8_e4m3fn_blockwise", {}, FP8, (1, 1), '{"format":"float8_e4m3fn_blockwise","group_size":128}'),
    ("int8_blockwise", {"block_size": 8}, INT, (1, 4), '{"format":"int8_blockwise","group_size":8}'),
    ("int8_tensorwise", {}, INT, (6, 1), '{"format":"int8_tensorwise","per_row":true}'),
    ("int8_tensorwise", {"granularity": "row"}, INT, (6, 1), '{"format":"int8_tensorwise","per_row":true}'),
    ("int8_tensorwise", {"granularity": "tensor"}, INT, (), '{"format":"int8_tensorwise"}'),
    (
        "int8_tensorwise",
        {"convrot": True},
        INT,
        (6, 1),
        '{"format":"int8_tensorwise","per_row":true,"convrot":true,"convrot_groupsize":16}',
    ),
]


@pytest.fixture
def weight():
    return torch.randn(6, 32, generator=torch.Generator().manual_seed(1))


def test_a_layer_has_a_weight_a_scale_and_its_json(subtests, weight):
    for format, options, dtype, scale, text in CASES:
        tensors = quantize_weight(weight, format, **options).tensors("blocks.0.qkv")
        with subtests.test(text):
            assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()} == {
                "blocks.0.qkv.weight": (dtype, (6, 32)),
                "blocks.0.qkv.weight_scale": (torch.float32, scale),
                "blocks.0.qkv.comfy_quant": (torch.uint8, (len(text),)),
            }
            assert tensors["blocks.0.qkv.comfy_quant"].numpy().tobytes().decode() == text
            assert [name for name, tensor in tensors.items() if not tensor.is_contiguous()] == []


def test_dequantize_is_float32_of_the_shape_of_the_weight(weight):
    decoded = quantize_weight(weight.half(), "int8_tensorwise").dequantize()
    assert decoded.dtype == torch.float32
    assert decoded.shape == weight.shape


def test_a_rotated_weight_comes_back_in_its_own_basis():
    weight = torch.randn(5, 128, generator=torch.Generator().manual_seed(1))
    rotated = quantize_weight(weight, "int8_tensorwise", convrot=64)
    assert rotated.codec.rotation.size == 64
    assert (rotated.dequantize() - weight).norm() < 0.02 * weight.norm()
    plain = rotated.qdata.float() * rotated.scale
    assert (plain - weight).norm() > weight.norm()  # the stored matrix is another one


def test_convolutions_are_for_the_library_only(sentences):
    weight = torch.randn(4, 6, 3, 3, generator=torch.Generator().manual_seed(1))
    quantized = quantize_weight(weight, "int8_tensorwise")
    assert quantized.qdata.shape == (4, 54)
    assert quantized.dequantize().shape == weight.shape
    assert (quantized.dequantize() - weight).norm() < 0.02 * weight.norm()
    with sentences.raises(QuantizationError):
        quantized.tensors("conv")


def test_a_corrected_bias_is_among_the_tensors(weight):
    bias, mean = torch.zeros(6, dtype=torch.bfloat16), torch.ones(32)
    quantized = quantize_weight(weight, "int8_tensorwise", bias=bias, mean=mean)
    assert quantized.tensors("fc")["fc.bias"].dtype is torch.bfloat16


def test_a_layer_without_a_bias_has_none(weight):
    assert "fc.bias" not in quantize_weight(weight, "int8_tensorwise").tensors("fc")


def test_an_input_scale_is_among_the_tensors(weight):
    tensors = quantize_weight(weight, "float8_e4m3fn", input_scale=0.25).tensors("fc")
    assert tensors["fc.input_scale"] == 0.25


def test_the_range_of_the_scales_is_that_of_its_rows(weight):
    weight = weight / weight.abs().amax(1, keepdim=True) * torch.arange(1.0, 7)[:, None] * 127
    assert quantize_weight(weight, "int8_tensorwise", rounding="nearest").scale_range == pytest.approx((1, 6))
