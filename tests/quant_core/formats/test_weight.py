"""How a quantized weight stands in a file: names, dtypes, shapes and the bytes of its JSON."""

import json

import pytest
import torch

from learned_rounding.quant_core import quantize_weight
from learned_rounding.quant_core.checkpoints import layer_configs, quantization_metadata
from learned_rounding.quant_core.checkpoints.source import TensorSource

CASES = [
    ("float8_e4m3fn", None, False, torch.float8_e4m3fn, (), '{"format":"float8_e4m3fn"}'),
    (
        "float8_e4m3fn",
        None,
        True,
        torch.float8_e4m3fn,
        (),
        '{"format":"float8_e4m3fn","full_precision_matrix_mult":true}',
    ),
    ("int8_tensorwise", None, False, torch.int8, (6, 1), '{"format":"int8_tensorwise","per_row":true}'),
    ("int8_tensorwise", "row", False, torch.int8, (6, 1), '{"format":"int8_tensorwise","per_row":true}'),
    ("int8_tensorwise", "tensor", False, torch.int8, (), '{"format":"int8_tensorwise"}'),
]


@pytest.fixture
def weight():
    return torch.randn(6, 10, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("format, granularity, full_precision, dtype, scale, text", CASES)
def test_tensors_of_a_layer(weight, format, granularity, full_precision, dtype, scale, text):
    quantized = quantize_weight(weight, format, granularity=granularity, full_precision_matmul=full_precision)
    tensors = quantized.tensors("blocks.0.qkv")
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()} == {
        "blocks.0.qkv.weight": (dtype, (6, 10)),
        "blocks.0.qkv.weight_scale": (torch.float32, scale),
        "blocks.0.qkv.comfy_quant": (torch.uint8, (len(text),)),
    }
    assert tensors["blocks.0.qkv.comfy_quant"].numpy().tobytes().decode() == text
    assert all(tensor.is_contiguous() for tensor in tensors.values())


@pytest.mark.parametrize("format, granularity, full_precision, dtype, scale, text", CASES)
def test_header_entry_says_what_the_tensor_says(weight, format, granularity, full_precision, dtype, scale, text):
    quantized = quantize_weight(weight, format, granularity=granularity, full_precision_matmul=full_precision)
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
        scale = quantized.scale if granularity == "tensor" else quantized.scale[row, 0]
        assert torch.equal(decoded[row], torch.stack([code.float() * scale for code in quantized.codes[row]]))
    assert (decoded - weight).norm() < 0.1 * weight.norm()
