"""A quantized layer as ComfyUI computes it on a card."""

import torch
from torch.nn import functional

from learned_rounding.quant_core import quantize_weight
from learned_rounding.quant_core.formats import make_codec
from learned_rounding.quant_core.sequential import linear as module
from learned_rounding.quant_core.sequential.linear import QuantizedLinear, quantize_inputs, reduce_inputs

IN, OUT, HOPPER, OLDER = 64, 48, (9, 0), (8, 6)
FORMATS = {
    "INT8": {"format": "int8_tensorwise", "convrot": False},
    "INT8, rotated": {"format": "int8_tensorwise", "convrot": 16},
    "FP8": {"format": "float8_e4m3fn"},
    "W4A8": {"format": "asym_w4a8_int8"},
    "nvfp4": {"format": "nvfp4"},
}


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


X, WEIGHT, BIAS = random(2, 5, IN), random(OUT, IN, seed=1) / 8, random(OUT, seed=2)


def make(kind: str, capability=HOPPER):
    """A quantized layer, and how it runs."""
    made = quantize_weight(WEIGHT, **FORMATS[kind], rounding="nearest", bias=BIAS)
    return made, QuantizedLinear(made.codec, made.parts(), made.shape, capability)


def test_layer_multiplies_quantized_activations_and_adds_the_bias(subtests):
    for kind in FORMATS:
        with subtests.test(kind):
            made, layer = make(kind)
            quantized = quantize_inputs(made.codec, X.flatten(0, 1), None, HOPPER)
            expected = functional.linear(quantized, made.dequantize(), BIAS).view(2, 5, OUT)
            torch.testing.assert_close(layer(X), expected, rtol=1e-4, atol=1e-4)


def test_layer_without_activations_multiplies_those_of_the_model(subtests):
    for kind in FORMATS:
        with subtests.test(kind):
            made, layer = make(kind)
            expected = functional.linear(X, made.dequantize(), BIAS)
            torch.testing.assert_close(layer.without_activations()(X), expected, rtol=1e-4, atol=1e-4)


def test_card_that_does_not_multiply_the_format_has_unquantized_activations():
    _, older = make("FP8", OLDER)
    assert torch.equal(older(X), older.without_activations()(X))
    _, hopper = make("FP8")
    assert not torch.equal(hopper(X), older(X))


def test_static_input_scale_is_that_of_the_layer():
    codec, small = make_codec("float8_e4m3fn"), X.flatten(0, 1) * 1e-3
    plain, scaled = (quantize_inputs(codec, small, scale, HOPPER) for scale in (None, 1e-5))
    assert (scaled - small).norm() < 0.05 * small.norm()
    assert (plain - small).norm() > 0.05 * small.norm()


def test_layer_takes_its_static_scale_from_the_file():
    made, _ = make("FP8")
    parts = made.parts() | {"input_scale": torch.tensor(1e-5)}
    layer = QuantizedLinear(made.codec, parts, made.shape, HOPPER)
    expected = functional.linear(X * 1e-3, made.dequantize(), BIAS)
    assert (layer(X * 1e-3) - expected).norm() < 0.05 * (expected - BIAS).norm()


def test_output_has_the_dtype_of_the_activations(subtests):
    for dtype in [torch.float16, torch.bfloat16, torch.float32]:
        with subtests.test(dtype=dtype):
            made, layer = make("INT8")
            found = layer(X.to(dtype))
            assert found.dtype is dtype
            expected = functional.linear(X, made.dequantize(), BIAS)
            assert (found.float() - expected).norm() < 0.02 * expected.norm()


def test_further_arguments_of_the_call_are_ignored():
    _, layer = make("INT8")
    assert torch.equal(layer(X, "more"), layer(X))


def test_slabs_of_activations_give_the_same(monkeypatch):
    made, layer = make("INT8, rotated")
    whole, reduced = layer(X), reduce_inputs(made.codec, X, None, HOPPER)
    monkeypatch.setattr(module, "_SLAB", 3 * IN)
    assert torch.equal(reduce_inputs(made.codec, X, None, HOPPER), reduced)
    torch.testing.assert_close(layer(X), whole)


def test_reduced_inputs_keep_shape_and_dtype():
    found = reduce_inputs(make_codec("int8_tensorwise"), X.bfloat16(), None, HOPPER)
    assert found.shape == X.shape
    assert found.dtype is torch.bfloat16


def test_one_token_without_a_dimension_of_tokens_gives_the_same(subtests):
    for kind in FORMATS:
        with subtests.test(kind):
            _, layer = make(kind)
            torch.testing.assert_close(layer(X[0, 0]), layer(X[:1, 0])[0])
