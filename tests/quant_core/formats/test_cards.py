"""Facts about cards: what stock ComfyUI 0.33 does with each format, and the output error that follows from it."""

import pytest
import torch

from learned_rounding.quant_core import quantize_weight
from learned_rounding.quant_core.formats import (
    E2M1,
    E4M3,
    FORMATS,
    INT4,
    INT8,
    FormatConfig,
    Rotation,
    ScaleGroups,
    SolveSpace,
)
from learned_rounding.quant_core.formats.cards import CARDS, describe_support, find_support, parse_card
from learned_rounding.quant_core.formats.scales import FLOAT32, TWO_LEVEL_E4M3
from learned_rounding.quant_core.layer import output_error

NATIVE = {  # format → cards whose ComfyUI quantizes activations, as read in its source
    "int8_tensorwise": CARDS,
    "asym_w4a8_int8": CARDS,
    "convrot_w4a4": CARDS,
    "float8_e4m3fn": ("8.9", "9.0", "10.0", "12.0"),
    "nvfp4": ("10.0", "12.0"),
    "mxfp8": ("10.0", "12.0"),
    "float8_e5m2": (),
}
INNER = 256


def test_support_is_what_comfyui_does(subtests):
    for name, expected in NATIVE.items():
        codec = FormatConfig(name).codec
        found = {card: find_support(codec, parse_card(card)) for card in CARDS}
        with subtests.test(name):
            assert [card for card in CARDS if found[card] == "native"] == list(expected)
            assert {found[card] for card in CARDS if card not in expected} <= {"decoded"}


def test_formats_that_stock_comfyui_does_not_read_are_unsupported_on_every_card(subtests):
    unread = [FormatConfig(name) for name in FORMATS if name not in NATIVE] + [FormatConfig("asym_w4a8_int8", bits=6)]
    assert len(unread) == 4
    for format in unread:
        with subtests.test(str(format.codec)):
            assert {find_support(format.codec, parse_card(card)) for card in CARDS} == {"unsupported"}


def test_int4_activations_exist_between_sm_7_5_and_9_0():
    codec = FormatConfig("convrot_w4a4", linear_dtype="int4").codec
    found = {card: describe_support(codec, parse_card(card)) for card in CARDS}
    few = [card for card, text in found.items() if text == "native, INT4 activations"]
    assert few == ["7.5", "8.0", "8.6", "8.9"]
    assert {found[card] for card in CARDS if card not in few} == {"native, INT8 activations"}


def test_smallest_capabilities_are_those_of_comfy_kitchen(subtests):
    kitchen = pytest.importorskip("comfy_kitchen.tensor")
    for name, layout in {"float8_e4m3fn": "FP8", "nvfp4": "NVFP4", "mxfp8": "MXFP8"}.items():
        with subtests.test(name):
            assert FORMATS[name].native_since == getattr(kitchen, f"TensorCore{layout}Layout").MIN_SM_VERSION
    assert parse_card(CARDS[0]) == kitchen.TensorWiseINT8Layout.MIN_SM_VERSION


def per_token(elements, rotation):
    """Activations rotated, and quantized with one float32 scale per token."""

    def quantize(x):
        space = SolveSpace(elements, ScaleGroups(len(x), INNER, 1, INNER), FLOAT32)
        return rotation.restore(space.round_nearest(rotation.apply(x)))

    return quantize


def in_groups_of_16(x):
    return SolveSpace(E2M1, ScaleGroups(len(x), INNER, 1, 16), TWO_LEVEL_E4M3).round_nearest(x)


ACTIVATIONS = [  # format, card, how the card quantizes activations (None: it multiplies the dequantized weight)
    (FormatConfig("nvfp4"), "8.9", None),
    (FormatConfig("nvfp4"), "9.0", None),
    (FormatConfig("nvfp4"), "10.0", in_groups_of_16),
    (FormatConfig("mxfp8"), "9.0", None),
    (FormatConfig("float8_e4m3fn"), "8.6", None),
    (FormatConfig("float8_e4m3fn"), "8.9", lambda x: E4M3.encode(x).float()),
    (FormatConfig("asym_w4a8_int8"), "7.5", per_token(INT8, Rotation(256))),
    (FormatConfig("asym_w4a8_int8"), "12.0", per_token(INT8, Rotation(256))),
    (FormatConfig("convrot_w4a4", linear_dtype="int4"), "7.5", per_token(INT4, Rotation(256))),
    (FormatConfig("convrot_w4a4", linear_dtype="int4"), "8.9", per_token(INT4, Rotation(256))),
    (FormatConfig("convrot_w4a4", linear_dtype="int4"), "9.0", per_token(INT8, Rotation(256))),
    (FormatConfig("convrot_w4a4", linear_dtype="int4"), "12.0", per_token(INT8, Rotation(256))),
    (FormatConfig("convrot_w4a4"), "8.6", per_token(INT8, Rotation(256))),
    (FormatConfig("int8_tensorwise", convrot=256), "8.6", per_token(INT8, Rotation(256))),
]


def test_errors_are_of_activations_as_the_card_has_them(subtests):
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(64, INNER, generator=generator), torch.randn(48, INNER, generator=generator)
    expected = x @ weight.t()
    for format, card, quantize in ACTIVATIONS:
        options = {"convrot": format.convrot, "linear_dtype": format.linear_dtype}
        made = quantize_weight(weight, format.name, rounding="nearest", **options)
        product = (
            x @ made.dequantize_in(torch.bfloat16).float().t()
            if quantize is None
            else quantize(x) @ made.dequantize().t()
        )
        error = float((product - expected).norm() / expected.norm())
        with subtests.test(str(format.codec), card=card):
            assert output_error(weight, made, x, parse_card(card)) == pytest.approx(error, rel=1e-4)
