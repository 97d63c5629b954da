"""How a quantized weight stands in a file: names, dtypes, shapes and the bytes of its JSON."""

import json

import pytest
import torch

from learned_rounding.quant_core import QuantizationError, quantize_weight
from learned_rounding.quant_core.formats.layer_json import layer_configs, quantization_metadata
from learned_rounding.quant_core.sources import TensorSource

# format, options, dtype of the codes, shape of the scale, JSON
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


@pytest.mark.parametrize("format, options, dtype, scale, text", CASES)
def test_tensors_of_a_layer(weight, format, options, dtype, scale, text):
    quantized = quantize_weight(weight, format, **options)
    tensors = quantized.tensors("blocks.0.qkv")
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()} == {
        "blocks.0.qkv.weight": (dtype, (6, 32)),
        "blocks.0.qkv.weight_scale": (torch.float32, scale),
        "blocks.0.qkv.comfy_quant": (torch.uint8, (len(text),)),
    }
    assert tensors["blocks.0.qkv.comfy_quant"].numpy().tobytes().decode() == text
    assert all(tensor.is_contiguous() for tensor in tensors.values())


@pytest.mark.parametrize("format, options, dtype, scale, text", CASES)
def test_header_entry_says_what_the_tensor_says(weight, format, options, dtype, scale, text):
    quantized = quantize_weight(weight, format, **options)
    header = quantization_metadata({"fc": quantized.config})
    assert json.loads(header) == {"format_version": "1.0", "layers": {"fc": json.loads(text)}}
    from_tensors, from_header = layer_configs(TensorSource(quantized.tensors("fc"), {"_quantization_metadata": header}))
    assert from_tensors == from_header == {"fc": quantized.config}
    assert text in header  # byte for byte the same spelling


@pytest.mark.parametrize(
    "format, granularity", [("float8_e4m3fn", "tensor"), ("int8_tensorwise", "row"), ("int8_tensorwise", "tensor")]
)
def test_dequantize_is_scale_times_code(weight, format, granularity):
    quantized = quantize_weight(weight, format, granularity=granularity)
    decoded = quantized.dequantize()
    assert decoded.dtype == torch.float32 and decoded.shape == weight.shape
    for row in range(6):
        scale = quantized.scale[0 if granularity == "tensor" else row, 0]
        assert torch.equal(decoded[row], torch.stack([code.float() * scale for code in quantized.qdata[row]]))
    assert (decoded - weight).norm() < 0.1 * weight.norm()


@pytest.mark.parametrize("format", ["float8_e4m3fn_blockwise", "int8_blockwise"])
def test_blocks_at_the_edges_may_be_smaller(format):
    weight = torch.randn(19, 45, generator=torch.Generator().manual_seed(1))
    weight[16:, 40:] *= 100  # the last block alone holds large weights
    quantized = quantize_weight(weight, format, block_size=8)
    assert quantized.scale.shape == (3, 6)
    assert quantized.scale[2, 5] > 10 * quantized.scale[:2].max()
    decoded = quantized.dequantize()
    for top in range(0, 19, 8):
        for left in range(0, 45, 8):
            block = (slice(top, top + 8), slice(left, left + 8))
            scale = quantized.scale[top // 8, left // 8]
            assert torch.equal(decoded[block], quantized.qdata[block].float() * scale)
            assert (decoded[block] - weight[block]).norm() < 0.05 * weight[block].norm()


def test_a_rotated_weight_comes_back_in_its_own_basis():
    weight = torch.randn(5, 128, generator=torch.Generator().manual_seed(1))
    rotated = quantize_weight(weight, "int8_tensorwise", convrot=64)
    assert rotated.codec.rotation.size == 64
    assert (rotated.dequantize() - weight).norm() < 0.02 * weight.norm()
    plain = rotated.qdata.float() * rotated.scale
    assert (plain - weight).norm() > weight.norm()  # what stands in the file is another matrix


def test_convolutions_are_for_the_library_only(sentences):
    weight = torch.randn(4, 6, 3, 3, generator=torch.Generator().manual_seed(1))
    quantized = quantize_weight(weight, "int8_tensorwise")
    assert quantized.qdata.shape == (4, 54) and quantized.dequantize().shape == weight.shape
    assert (quantized.dequantize() - weight).norm() < 0.02 * weight.norm()
    with sentences.raises(QuantizationError):
        quantized.tensors("conv")


def test_a_corrected_bias_stands_with_its_weight(weight):
    bias, mean = torch.zeros(6, dtype=torch.bfloat16), torch.ones(32)
    quantized = quantize_weight(weight, "int8_tensorwise", bias=bias, mean=mean)
    assert quantized.tensors("fc")["fc.bias"].dtype is torch.bfloat16
    assert "fc.bias" not in quantize_weight(weight, "int8_tensorwise").tensors("fc")
