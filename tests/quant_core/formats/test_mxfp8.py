"""MXFP8: bytes as the description has them, and bit for bit what comfy-kitchen's own quantizer makes."""

import pytest
import torch

from learned_rounding.quant_core import quantize_weight
from learned_rounding.quant_core.formats import make_codec
from learned_rounding.tests.quant_core.formats.microscaling import (
    CASES,
    SHAPES,
    dequantize_in_kitchen,
    describe,
    find_scale,
    tensors_of,
    tensors_of_kitchen,
)
from learned_rounding.tests.quant_core.formats.weights import (
    HARD,
    correlated_hessian,
    parts_of,
    random,
    stored_values,
    values_of_all_sizes,
)


def read_value(parts, row: int, column: int) -> torch.Tensor:
    exponent = find_scale(parts["weight_scale"], row, column // 32).item()
    return torch.tensor(2.0 ** (exponent - 127) if exponent else 0.0) * parts["weight"][row, column].float()


def test_each_value_is_at_the_byte_of_the_description(subtests):
    for make in HARD:
        made = quantize_weight(make((12, 64)), "mxfp8")
        parts = parts_of(made)
        values = torch.tensor([[read_value(parts, row, column) for column in range(64)] for row in range(12)])
        with subtests.test(make.__name__):
            assert torch.equal(values, stored_values(made))


def test_rows_and_columns_are_padded_with_zeros_to_32():
    parts = parts_of(quantize_weight(random((33, 97)), "mxfp8", rounding="nearest"))
    assert parts["weight"].shape == (64, 128)
    assert not parts["weight"].view(torch.uint8)[33:].any()
    assert not parts["weight"].view(torch.uint8)[:, 97:].any()
    assert parts["weight_scale"].shape == (128, 4)


def test_nearest_equals_comfy_kitchen(subtests):
    for make, shape in CASES:
        with subtests.test(make.__name__, shape=shape):
            assert describe(tensors_of(make(shape), "mxfp8")) == describe(tensors_of_kitchen(make(shape), "MXFP8"))


def test_dequantize_equals_comfy_kitchen(subtests):
    for shape in SHAPES:
        weight = values_of_all_sizes(shape) + random(shape)
        expected = dequantize_in_kitchen(weight, "MXFP8")
        with subtests.test(shape=shape):
            assert torch.equal(quantize_weight(weight, "mxfp8", rounding="nearest").dequantize(), expected)


def test_an_all_zero_weight_stays_zero():
    made = quantize_weight(torch.zeros(32, 64), "mxfp8", rounding="nearest")
    assert not made.dequantize().any()
    assert made.weight_error == 0


def test_weights_below_the_smallest_scale_stay_finite():
    """comfy-kitchen's quantizer divides by 0 there and writes NaN."""
    weight = random((32, 64)).sign() * 1e-38
    made = quantize_weight(weight, "mxfp8", rounding="nearest")
    assert (made.dequantize() - weight).abs().max() <= 1e-38


def test_round_to_nearest_has_the_published_error():
    assert quantize_weight(random((512, 512)), "mxfp8", rounding="nearest").weight_error == pytest.approx(
        0.0265, rel=0.05
    )


def test_gptq_lowers_the_output_error():
    nearest, calibrated = (
        quantize_weight(random((48, 64)), "mxfp8", rounding=name, hessian=correlated_hessian()).output_error
        for name in ("nearest", "calibrated")
    )
    assert calibrated < 0.9 * nearest


def test_activations_are_quantized_as_by_comfy_kitchen_from_sm_10_0():
    x, codec = random((20, 96)), make_codec("mxfp8")
    assert torch.equal(codec.quantize_activations(x, capability=(9, 0)), x)
    assert torch.equal(codec.quantize_activations(x, capability=(10, 0)), dequantize_in_kitchen(x, "MXFP8"))
