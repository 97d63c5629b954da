"""Checks of the arguments of the public functions: each refusal names what does not match."""

import pytest
import torch

from learned_rounding import kernels
from learned_rounding.kernels.checks import can_rotate, check_scale

X = torch.ones(2, 96)
QDATA, SCALE = kernels.quantize_int8_block_weight(torch.ones(8, 96), 32)
INVALID = {
    "channels": lambda: kernels.int8_block_linear(X[:, :64], QDATA, SCALE, block_size=32),
    "block size of the scale": lambda: kernels.int8_block_linear(X, QDATA, SCALE),
    "dtype": lambda: kernels.fp8_block_linear(X, QDATA, SCALE, block_size=32),
    "bias": lambda: kernels.int8_block_linear(X, QDATA, SCALE, torch.ones(3), block_size=32),
    "rotation that does not divide": lambda: kernels.int8_row_linear(X, QDATA, SCALE, rotate_by=256),
    "unknown rotation": lambda: kernels.int8_row_linear(X, QDATA, SCALE, rotate_by=5),
    "rotated blocks": lambda: kernels.scaled_linear(X, QDATA, SCALE, block_size=32, rotate_by=16),
    "rotated blocks of a weight": lambda: kernels.dequantize_weight(QDATA, SCALE, block_size=32, rotate_by=16),
    "block size of zero": lambda: kernels.quantize_int8_block(X, 0),
}


def test_invalid_arguments_raise_a_value_error_with_the_reason(subtests, sentences):
    for name, call in INVALID.items():
        with subtests.test(name), sentences.raises(ValueError):
            call()


def test_a_scale_has_one_value_or_one_per_row():
    assert check_scale(QDATA, torch.tensor(0.5), 0).shape == (1, 1)
    assert check_scale(QDATA, torch.ones(8), 0).shape == (8, 1)
    with pytest.raises(ValueError, match="needs a scale with 1 or 8 values"):
        check_scale(QDATA, torch.ones(7), 0)


def test_a_scale_of_blocks_has_their_number():
    assert check_scale(QDATA, SCALE, 32) is SCALE
    with pytest.raises(ValueError, match="in blocks of 16 needs a scale of shape"):
        check_scale(QDATA, SCALE, 16)


def test_channels_are_rotated_in_groups_that_divide_them(subtests):
    for inner, rotate_by, expected in (
        (96, 0, True),
        (96, 16, True),
        (96, 64, False),
        (128, 64, True),
        (128, 32, False),
    ):
        with subtests.test(inner=inner, rotate_by=rotate_by):
            assert can_rotate(inner, rotate_by) is expected


# W4A8

WRONG = {
    "activations": ({"x": torch.zeros(2, 128)}, "Activations with 128 channels do not match a W4A8 weight with 256."),
    "groups": (
        {"group_scale": torch.zeros(50, 15)},
        r"A W4A8 weight of shape \(50, 128\) has no groups .* \(50, 15\).",
    ),
    "dtype of groups": (
        {"group_scale": torch.zeros(50, 16).half()},
        "Group scales must be float8_e4m3fn or float32, not torch.float16.",
    ),
    "codebook": ({"codebook": torch.zeros(8)}, r"A codebook must have 16 float32 values, not torch.float32 \(8,\)."),
    "scale": (
        {"scale": torch.zeros(50, 1)},
        r"A W4A8 weight with 50 rows needs as many float32 scales, not torch.float32 \(50, 1\).",
    ),
    "bias": ({"bias": torch.zeros(51)}, r"The bias must have shape \(50,\) to match a W4A8 weight with 50 rows."),
    "rotation": ({"rotate_by": 32}, "The rotation group size must be 16, 64 or 256, not 32."),
}


def test_the_wrong_tensor_of_a_w4a8_layer_is_named(subtests):
    usual = {
        "x": torch.zeros(2, 256),
        "codes": torch.zeros(50, 128, dtype=torch.int8),
        "group_scale": torch.ones(50, 16).to(torch.float8_e4m3fn),
        "scale": torch.ones(50),
        "codebook": torch.linspace(-1, 1, 16),
    }
    assert kernels.w4a8_linear(**usual).shape == (2, 50)
    for name, (change, sentence) in WRONG.items():
        with subtests.test(name), pytest.raises(ValueError, match=f"^{sentence}$"):
            kernels.w4a8_linear(**{**usual, **change})
