"""Encodings: every choice a format leaves open is made, acts, and survives as JSON."""

import pytest
import torch

from learned_rounding.quant_core import FORMATS
from learned_rounding.quant_core.errors import RecipeError, UnknownNameError
from learned_rounding.quant_core.formats import Encoding, Rotation, make_encoding

CASES = [
    (name, {"granularity": granularity} | options)
    for name, entry in FORMATS.items()
    for granularity in entry.granularities
    for options in (
        {},
        *({"block_size": size} for size in (8, 1024) if granularity == "block"),
        *({"convrot": size} for size in (256, 64, 16) if (name, granularity) == ("int8_tensorwise", "row")),
        *({"full_precision_matmul": True} for _ in "x" if entry.full_precision_matmul != "never"),
    )
]


@pytest.mark.parametrize("name, options", CASES)
def test_the_json_gives_the_encoding_back(name, options):
    encoding = make_encoding(name, **options)
    assert Encoding.from_config(encoding.config, encoding.granularity) == encoding
    assert encoding.config["format"] == name


def test_the_first_granularity_and_blocks_of_128_are_the_defaults():
    assert make_encoding("int8_tensorwise").granularity == "row"
    assert make_encoding("int8_blockwise").block_size == 128


@pytest.mark.parametrize(
    "name, options, scale",
    [
        ("float8_e4m3fn", {}, ()),
        ("float8_e5m2", {}, ()),
        ("float8_e4m3fn_rowwise", {}, (6, 1)),
        ("float8_e4m3fn_blockwise", {}, (1, 2)),
        ("int8_blockwise", {"block_size": 8}, (1, 25)),
        ("int8_tensorwise", {}, (6, 1)),
        ("int8_tensorwise", {"granularity": "tensor"}, ()),
        ("int8_tensorwise", {"convrot": 16}, (6, 1)),
    ],
)
def test_specs_give_dtypes_and_shapes(name, options, scale):
    assert make_encoding(name, **options).specs((6, 200)) == {
        "weight": (FORMATS[name].grid.dtype, (6, 200)),
        "weight_scale": (torch.float32, scale),
    }


@pytest.mark.parametrize(
    "name, options",
    [
        # Stock ComfyUI crashes on, or silently misreads, row scales under the name float8_e4m3fn.
        ("float8_e4m3fn", {"granularity": "row"}),
        ("float8_e5m2", {"granularity": "row"}),
        ("int8_tensorwise", {"block_size": 64}),
        ("int8_blockwise", {"block_size": 100}),
        ("int8_blockwise", {"block_size": 4}),
        ("int8_blockwise", {"block_size": 64.0}),
        ("float8_e4m3fn", {"convrot": 256}),
        ("int8_tensorwise", {"granularity": "tensor", "convrot": 256}),
        ("int8_tensorwise", {"convrot": 32}),
        ("int8_blockwise", {"full_precision_matmul": True}),
    ],
)
def test_what_has_no_effect_is_refused(name, options, sentences):
    with sentences.raises(RecipeError):
        make_encoding(name, **options)


def test_an_unknown_granularity_suggests_the_nearest(sentences):
    with sentences.raises(UnknownNameError):
        make_encoding("int8_tensorwise", "tensr")


def test_people_read_everything_that_was_chosen():
    assert str(make_encoding("int8_tensorwise", convrot=64)) == "int8_tensorwise per row, ConvRot 64"
    assert str(make_encoding("int8_blockwise", block_size=32)) == "int8_blockwise per block of 32"
    assert make_encoding("int8_tensorwise", convrot=64).rotation == Rotation(64)


@pytest.mark.parametrize("name", FORMATS)
def test_inputs_are_quantized_as_the_format_says(name):
    """To the same grid, each token or block by its own largest value; what no kernel quantizes stays."""
    inputs = torch.randn(5, 80, generator=torch.Generator().manual_seed(0)) * torch.logspace(-2, 2, 5)[:, None]
    encoding = make_encoding(name)
    made, kind = encoding.quantize_inputs(inputs), FORMATS[name].inputs
    if kind is None:
        assert torch.equal(made, inputs) and encoding.quantized_inputs is None
        return
    assert encoding.quantized_inputs == (FORMATS[name].grid, kind)
    width = {"tensor": None, "token": 80, "block": 128}[kind]
    scale = inputs.abs().amax(1, keepdim=True) / FORMATS[name].grid.max if width else torch.ones(5, 1)
    steps = FORMATS[name].grid.encode(inputs / scale).float() * scale
    torch.testing.assert_close(made, steps)
    assert 0 < (made - inputs).norm() / inputs.norm() < 0.06


def test_blocks_of_a_token_have_scales_of_their_own():
    inputs = torch.cat([torch.ones(1, 16) * 1e-3, torch.ones(1, 24) * 1e3], dim=1)
    made = make_encoding("int8_blockwise", block_size=16).quantize_inputs(inputs)
    torch.testing.assert_close(made, inputs)


def test_rotated_inputs_are_quantized_where_they_are_rotated():
    inputs = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    inputs[:, 5] *= 100
    plain, rotated = (make_encoding("int8_tensorwise", "row", convrot=group) for group in (None, 64))
    errors = [float((one.quantize_inputs(inputs) - inputs)[:, :5].norm()) for one in (plain, rotated)]
    assert errors[1] < 0.5 * errors[0]


def test_a_decoded_weight_is_multiplied_with_inputs_as_they_are():
    inputs = torch.randn(2, 16) * 1e-4
    assert torch.equal(make_encoding("float8_e4m3fn", full_precision_matmul=True).quantize_inputs(inputs), inputs)
    assert not torch.equal(make_encoding("float8_e4m3fn").quantize_inputs(inputs), inputs)
