"""NVFP4: bytes as the description has them, and bit for bit what comfy-kitchen's own quantizer makes."""

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
    groups_of_all_sizes,
    parts_of,
    random,
    stored_values,
    values_of_all_sizes,
)

MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def read_value(parts, row: int, column: int) -> torch.Tensor:
    code = parts["weight"][row, column // 2].item() >> 4 * (1 - column % 2) & 15
    scale = find_scale(parts["weight_scale"], row, column // 16).float() * parts["weight_scale_2"]
    return scale * (-MAGNITUDES[code & 7] if code & 8 else MAGNITUDES[code & 7])


def test_each_value_is_at_the_byte_of_the_description(subtests):
    for make in HARD:
        made = quantize_weight(make((12, 64)), "nvfp4")
        parts = parts_of(made)
        values = torch.tensor([[read_value(parts, row, column) for column in range(64)] for row in range(12)])
        with subtests.test(make.__name__):
            assert torch.equal(values, stored_values(made))


def test_rows_and_columns_are_padded_with_zeros_to_16():
    parts = parts_of(quantize_weight(random((17, 49)), "nvfp4", rounding="nearest"))
    assert parts["weight"].shape == (32, 32)
    assert not parts["weight"][17:].any()
    assert not parts["weight"][:, 25:].any()
    assert parts["weight_scale"].shape == (128, 4)


def test_groups_whose_scale_vanishes_lose_no_more_than_their_values(subtests):
    weight = groups_of_all_sizes((64, 512))
    for rounding in ("nearest", "auto"):
        made = quantize_weight(weight, "nvfp4", rounding=rounding)
        scales = made.codec.scale_values("weight_scale", parts_of(made)["weight_scale"], (64, 512))
        with subtests.test(rounding):
            assert torch.isfinite(scales).all()
            assert (scales == 0).any()
            assert ((scales > 0) & (scales < 2.0**-6)).any()
            lost = stored_values(made).sub_(weight).unflatten(1, (-1, 16)).abs().amax(-1)
            assert (lost <= weight.unflatten(1, (-1, 16)).abs().amax(-1) * (1 + 1e-3)).all()


def test_nearest_equals_comfy_kitchen(subtests):
    for make, shape in CASES:
        weight = make(shape)
        made = tensors_of(weight, "nvfp4")
        raised = 0 < weight.abs().max() / (448 * 6) < 2.0**-16  # see test_scales.py
        expected = tensors_of_kitchen(weight, "NVFP4", **({"scale": made["a.weight_scale_2"]} if raised else {}))
        with subtests.test(make.__name__, shape=shape):
            assert describe(made) == describe(expected)


def test_dequantize_equals_comfy_kitchen(subtests):
    for shape in SHAPES:
        weight = values_of_all_sizes(shape) + random(shape)
        expected = dequantize_in_kitchen(weight, "NVFP4")
        with subtests.test(shape=shape):
            assert torch.equal(quantize_weight(weight, "nvfp4", rounding="nearest").dequantize(), expected)


def test_an_all_zero_weight_stays_zero():
    """comfy-kitchen's quantizer divides 0 by 0 there and writes NaN scales."""
    made = quantize_weight(torch.zeros(32, 64), "nvfp4", rounding="nearest")
    assert not made.dequantize().any()
    assert made.weight_error == 0


def test_round_to_nearest_has_the_published_error():
    assert quantize_weight(random((512, 512)), "nvfp4", rounding="nearest").weight_error == pytest.approx(
        0.095, rel=0.05
    )


def test_scale_search_lowers_the_error():
    """Among its candidates is the scale of four-over-six."""
    nearest, searched = (quantize_weight(random((128, 512)), "nvfp4", rounding=name) for name in ("nearest", "auto"))
    assert searched.weight_error < 0.95 * nearest.weight_error


def test_gptq_lowers_the_output_error():
    nearest, calibrated = (
        quantize_weight(random((48, 64)), "nvfp4", rounding=name, hessian=correlated_hessian()).output_error
        for name in ("nearest", "calibrated")
    )
    assert calibrated < 0.75 * nearest


def test_activations_are_quantized_as_by_comfy_kitchen_from_sm_10_0():
    x, codec = random((20, 96)), make_codec("nvfp4")
    assert torch.equal(codec.quantize_activations(x, capability=(9, 0)), x)
    assert torch.equal(codec.quantize_activations(x, capability=(10, 0)), dequantize_in_kitchen(x, "NVFP4"))
