"""NVFP4 and MXFP8, round to nearest: bit for bit what comfy-kitchen's own quantizers make."""

import pytest
import torch

from learned_rounding.quant_core import quantize_weight
from learned_rounding.quant_core.formats import detect_layer

kitchen = pytest.importorskip("comfy_kitchen.tensor")

SHAPES = ((64, 128), (1, 1), (16, 16), (40, 72), (130, 264), (257, 33))


def random(shape, seed=0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.05


def spread(shape) -> torch.Tensor:
    """Magnitudes over 60 octaves, so that group scales overflow, underflow and vanish."""
    exponents = torch.randint(-40, 20, shape, generator=torch.Generator().manual_seed(1))
    return torch.ldexp(random(shape), exponents)


def ties(shape) -> torch.Tensor:
    """Multiples of a quarter: many values halfway between two elements, and amax values that are powers of two."""
    return torch.randint(-32, 33, shape, generator=torch.Generator().manual_seed(2)) / 4


def with_zeros(shape) -> torch.Tensor:
    weight = random(shape)
    weight[::3] = 0
    weight[1::3, : shape[1] // 2] = -0.0
    weight[0, 0] = 1.0
    return weight


def with_outlier(shape) -> torch.Tensor:
    weight = random(shape)
    weight[-1, -1] = 3e4
    return weight


def tiny(shape) -> torch.Tensor:
    """Groups of MXFP8 whose scale is 2^−126, the smallest one that comfy-kitchen dequantizes."""
    return random(shape).sign() * torch.finfo(torch.float32).tiny * 448


def powers(shape) -> torch.Tensor:
    """amax of each group is 448 or 6 times a power of two, or the float32 next to it."""
    weight = random(shape)
    exponents = torch.arange(shape[0]) % 20 - 10
    largest = torch.ldexp(torch.where(torch.arange(shape[0]) % 2 == 0, 448.0, 6.0), exponents)
    weight[:, 0] = torch.where(torch.arange(shape[0]) % 3 == 0, torch.nextafter(largest, largest * 2), largest)
    return weight


WEIGHTS = (random, spread, ties, with_zeros, with_outlier, tiny, powers)
LAYOUTS = {"nvfp4": "TensorCoreNVFP4Layout", "mxfp8": "TensorCoreMXFP8Layout"}


def raw(tensors: dict[str, torch.Tensor]) -> dict[str, tuple]:
    return {
        name: (tuple(tensor.shape), tensor.contiguous().reshape(-1).view(torch.uint8).tolist())
        for name, tensor in tensors.items()
    }


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("make", WEIGHTS, ids=lambda make: make.__name__)
@pytest.mark.parametrize("format", LAYOUTS)
def test_nearest_equals_comfy_kitchen(format, make, shape):
    weight = make(shape)
    layout = getattr(kitchen, LAYOUTS[format])
    made = quantize_weight(weight, format, rounding="nearest").tensors("a")
    raised = format == "nvfp4" and 0 < weight.abs().max() / (448 * 6) < 2.0**-16  # see test_scales.py
    given = {"scale": made["a.weight_scale_2"]} if raised else {}
    quantized = layout.quantize(weight, **given)
    expected = {f"a.weight{key}": value for key, value in layout.state_dict_tensors(*quantized).items()}
    made.pop("a.comfy_quant")
    assert raw(made) == raw(expected)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("format", LAYOUTS)
def test_dequantize_equals_comfy_kitchen(format, shape):
    layout = getattr(kitchen, LAYOUTS[format])
    weight = spread(shape) + random(shape)
    expected = layout.dequantize(*layout.quantize(weight))[: shape[0], : shape[1]]
    assert torch.equal(quantize_weight(weight, format, rounding="nearest").dequantize(), expected)


@pytest.mark.parametrize("format", LAYOUTS)
def test_an_all_zero_weight_stays_zero(format):
    """comfy-kitchen's NVFP4 quantizer divides 0 by 0 there and writes NaN scales."""
    made = quantize_weight(torch.zeros(32, 64), format, rounding="nearest")
    assert not made.dequantize().any()
    assert made.weight_error == 0


def test_weights_below_the_smallest_scale_of_mxfp8_stay_finite():
    """comfy-kitchen's MXFP8 quantizer divides by 0 there and writes NaN."""
    weight = random((32, 64)).sign() * 1e-38
    made = quantize_weight(weight, "mxfp8", rounding="nearest")
    assert (made.dequantize() - weight).abs().max() <= 1e-38


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("rounding", ["nearest", "auto", "stochastic"])
@pytest.mark.parametrize("format", LAYOUTS)
def test_the_file_dequantizes_to_the_result(format, rounding, shape):
    made = quantize_weight(random(shape), format, rounding=rounding)
    tensors = made.tensors("a")
    codec = detect_layer("a", made.config, tensors)
    stored = codec.weight_shape(tuple(tensors["a.weight"].shape), made.config)
    parts = {name.removeprefix("a."): tensor for name, tensor in tensors.items()}
    assert stored == shape
    assert torch.equal(codec.dequantize(parts, stored), made.dequantize())


@pytest.mark.parametrize("format, error", [("nvfp4", 0.095), ("mxfp8", 0.0265)])
def test_round_to_nearest_has_the_error_of_the_format(format, error):
    """Relative error of Gaussian weights, as published for both formats."""
    made = quantize_weight(random((1024, 512)), format, rounding="nearest")
    assert made.weight_error == pytest.approx(error, rel=0.05)


def test_scale_search_lowers_the_error_of_nvfp4():
    """Among its candidates is the scale of four-over-six."""
    weight = random((256, 512))
    nearest, searched = (quantize_weight(weight, "nvfp4", rounding=rounding) for rounding in ("nearest", "auto"))
    assert searched.weight_error < 0.95 * nearest.weight_error


@pytest.mark.parametrize("format, gain", [("nvfp4", 0.75), ("mxfp8", 0.9)])
def test_gptq_lowers_the_output_error(format, gain):
    generator = torch.Generator().manual_seed(3)
    mixing = torch.randn(64, 64, generator=generator) * torch.logspace(0, -2, 64)
    x = torch.randn(4096, 64, generator=generator) @ mixing
    hessian, weight = x.t() @ x / len(x), random((48, 64))
    errors = [
        quantize_weight(weight, format, rounding=rounding, hessian=hessian).output_error
        for rounding in ("nearest", "calibrated")
    ]
    assert errors[1] < gain * errors[0]


@pytest.mark.parametrize("format", LAYOUTS)
def test_activations_are_quantized_on_cards_with_native_support_only(format):
    x = random((20, 96))
    codec = quantize_weight(random((32, 96)), format).codec
    assert torch.equal(codec.quantize_activations(x, capability=(9, 0)), x)
    layout = getattr(kitchen, LAYOUTS[format])
    expected = layout.dequantize(*layout.quantize(x))[:20, :96]
    assert torch.equal(codec.quantize_activations(x, capability=(10, 0)), expected)
