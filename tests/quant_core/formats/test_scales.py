"""Scales that ComfyUI casts to the dtype of the activations survive in float16, whatever the magnitude of the weights."""

import pytest
import torch

from learned_rounding.quant_core import quantize_weight
from learned_rounding.quant_core.formats import E4M3, E5M2

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MAGNITUDES = (50.0, 0.5, 0.02, 0.005, 5e-4, 1e-4, 1e-5)  # standard deviations
FP8 = {"float8_e4m3fn": E4M3, "float8_e5m2": E5M2}
# Format, granularity, and the relative error of round to nearest of normally distributed weights.
FORMATS = (
    ("float8_e4m3fn", "tensor", 0.0265),
    ("float8_e5m2", "tensor", 0.053),
    ("int8_tensorwise", "row", 0.0080),
    ("int8_tensorwise", "tensor", 0.0105),
    ("nvfp4", "group", 0.096),
)


def random(magnitude: float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (torch.randn(64, 256, generator=torch.Generator().manual_seed(0)) * magnitude).to(dtype)


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


def decode_as_comfyui(quantized, dtype: torch.dtype) -> torch.Tensor:
    """The weight as comfy-kitchen dequantizes it for activations of ``dtype``."""
    kitchen = pytest.importorskip("comfy_kitchen")
    parts = {name.removeprefix("a."): tensor for name, tensor in quantized.tensors("a").items()}
    weight, scale = parts["weight"], parts["weight_scale"]
    with kitchen.use_backend("eager"):
        if quantized.format.name == "nvfp4":
            return kitchen.dequantize_nvfp4(weight, parts["weight_scale_2"], scale, dtype)
        if quantized.format.name in FP8:
            return kitchen.dequantize_per_tensor_fp8(weight, scale, dtype)
        return kitchen.dequantize_int8_simple(weight, scale).to(dtype)


@pytest.mark.parametrize("rounding", ["nearest", "auto"])
@pytest.mark.parametrize("magnitude", MAGNITUDES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("format, granularity, expected", FORMATS, ids=lambda value: str(value))
def test_weights_survive_in_the_dtype_of_the_activations(format, granularity, expected, dtype, magnitude, rounding):
    weight = random(magnitude, dtype)
    quantized = quantize_weight(weight, format, granularity=granularity, rounding=rounding)
    # float16 cannot hold weights of 1e-5 more precisely, nor can bfloat16 hold a scale of more than 8 bits.
    assert relative(decode_as_comfyui(quantized, dtype), weight) < 1.06 * expected


@pytest.mark.parametrize("magnitude", MAGNITUDES)
@pytest.mark.parametrize("format", FP8)
def test_scales_are_normal_in_float16_and_move_by_whole_octaves(format, magnitude):
    weight, elements = random(magnitude), FP8[format]
    scale = float(quantize_weight(weight, format, rounding="nearest").scale)
    smallest = float(weight.abs().max() / elements.max)
    octaves = torch.tensor(scale / smallest).log2()
    assert scale >= torch.finfo(torch.float16).tiny and octaves == octaves.round()
    assert octaves == 0 or scale < 2 * torch.finfo(torch.float16).tiny  # no more than necessary


def test_ordinary_layers_are_stored_as_before():
    for magnitude in (0.02, 0.5):
        weight = random(magnitude)
        quantized = quantize_weight(weight, "float8_e4m3fn", rounding="nearest")
        scale = weight.abs().max() / 448
        assert torch.equal(quantized.scale.reshape(()), scale)
        assert torch.equal(
            quantized.qdata.view(torch.uint8), (weight / scale).to(torch.float8_e4m3fn).view(torch.uint8)
        )
        quantized = quantize_weight(weight, "nvfp4", rounding="nearest")
        assert torch.equal(quantized.tensors("a")["a.weight_scale_2"], weight.abs().max() / (448 * 6))


def test_a_raised_scale_keeps_the_values():
    """All of these E5M2 scales are subnormal in float16."""
    weight = random(0.02)
    scale = weight.abs().max() / E5M2.max
    quantized = quantize_weight(weight, "float8_e5m2", rounding="nearest")
    assert float(quantized.scale) > float(scale)
    assert torch.equal(quantized.dequantize(), (weight / scale).to(torch.float8_e5m2).float() * scale)


@pytest.mark.parametrize("format", ["float8_e4m3fn", "float8_e5m2", "nvfp4"])
def test_weights_below_float16_keep_their_precision(format):
    """A bfloat16 model may have them; three octaves of normal elements stay below the largest one."""
    weight = random(1e-9)
    quantized = quantize_weight(weight, format, rounding="nearest")
    assert quantized.weight_error < {"float8_e4m3fn": 0.029, "float8_e5m2": 0.06, "nvfp4": 0.1}[format]


def test_a_layer_of_zeros_has_the_scale_one():
    for format in FP8:
        assert float(quantize_weight(torch.zeros(4, 8), format, rounding="nearest").scale) == 1
