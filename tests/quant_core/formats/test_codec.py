"""Codecs: every choice that a format leaves open has an effect, and survives as JSON."""

import pytest
import torch

from learned_rounding.quant_core import FORMATS, quantize_weight
from learned_rounding.quant_core.errors import RecipeError, UnknownNameError
from learned_rounding.quant_core.formats import READABLE, Rotation, TensorSpec, make_codec

CASES = [
    (name, {"granularity": granularity} | options)
    for name, entry in FORMATS.items()
    for granularity in entry.granularities
    for options in (
        {"convrot": 256} if entry.always_rotated else {},
        *({name: value} | {"convrot": 16} for name, values in entry.codec.options.items() for value in values),
        *({"block_size": size} for size in (8, 1024) if granularity == "block"),
        *({"convrot": size} for size in (256, 64, 16) if (name, granularity) == ("int8_tensorwise", "row")),
        *({"full_precision_matmul": True} for _ in "x" if entry.full_precision_matmul != "never"),
    )
]


@pytest.mark.parametrize("name, options", CASES)
def test_the_json_gives_the_codec_back(name, options):
    codec = make_codec(name, **options)
    specs = codec.specs((64, 512))
    read = type(codec).from_config(codec.format, codec.config, codec.granularity).of_tensors(specs.get)
    assert read == codec and codec.config["format"] == name


def test_the_first_granularity_and_blocks_of_128_are_the_defaults():
    assert make_codec("int8_tensorwise").granularity == "row"
    assert make_codec("int8_blockwise").block_size == 128


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
    assert make_codec(name, **options).specs((6, 200)) == {
        "weight": TensorSpec(FORMATS[name].storage_dtype, (6, 200)),
        "weight_scale": TensorSpec(torch.float32, scale),
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
        make_codec(name, **options)


def test_an_unknown_granularity_suggests_the_nearest(sentences):
    with sentences.raises(UnknownNameError):
        make_codec("int8_tensorwise", "tensr")


def test_people_read_everything_that_was_chosen():
    assert str(make_codec("int8_tensorwise", convrot=64)) == "int8_tensorwise per row, ConvRot 64"
    assert str(make_codec("int8_blockwise", block_size=32)) == "int8_blockwise per block of 32"
    assert make_codec("int8_tensorwise", convrot=64).rotation == Rotation(64)


@pytest.mark.parametrize("name", READABLE)
def test_no_activations_are_quantized_where_the_card_cannot(name):
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    entry = READABLE[name]
    codec = entry.codec.from_config(entry, {"group_size": 16, "convrot_groupsize": 64}, next(iter(entry.granularities)))
    below = (entry.native_since[0] - 1, 9)
    assert codec.quantizes_activations() == (entry.activations is not None)
    if entry.native_since > (0, 0):
        assert torch.equal(codec.quantize_activations(x, below), x)


@pytest.mark.parametrize("name", FORMATS)
def test_activations_are_quantized_to_the_elements_of_the_format(name):
    """Each token, block or group by its own largest magnitude; a static scale is 1 until it is calibrated."""
    x = torch.randn(5, 80, generator=torch.Generator().manual_seed(0)) * torch.logspace(-2, 2, 5)[:, None]
    codec = make_codec(name)
    made, elements = codec.quantize_activations(x), codec.activation_elements()
    if codec.format.activations is None:
        assert torch.equal(made, x)
    elif codec.format.activations == "tensor":
        assert torch.equal(made, elements.encode(x.clone()).float())
    elif codec.format.activations == "token":
        scale = x.abs().amax(1, keepdim=True) / elements.max
        torch.testing.assert_close(made, elements.encode(x / scale).float() * scale)
    else:
        assert 0 < (made - x).norm() / x.norm() < (0.15 if elements.bits == 4 else 0.06)


def test_blocks_of_a_token_have_scales_of_their_own():
    x = torch.cat([torch.ones(1, 16) * 1e-3, torch.ones(1, 24) * 1e3], dim=1)
    torch.testing.assert_close(make_codec("int8_blockwise", block_size=16).quantize_activations(x), x)


def test_rotated_activations_are_quantized_in_the_rotated_basis():
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    x[:, 5] *= 100
    plain, rotated = (make_codec("int8_tensorwise", "row", convrot=group) for group in (None, 64))
    errors = [float((codec.quantize_activations(x) - x)[:, :5].norm()) for codec in (plain, rotated)]
    assert errors[1] < 0.5 * errors[0]


def test_a_dequantized_weight_is_multiplied_with_unquantized_activations():
    x = torch.randn(2, 16) * 1e-4
    assert torch.equal(make_codec("float8_e4m3fn", full_precision_matmul=True).quantize_activations(x), x)


@pytest.mark.parametrize("name", FORMATS)
def test_a_rotation_that_does_not_divide_is_the_reason(name):
    codec = make_codec(name, convrot=64) if FORMATS[name].rotated else make_codec(name)
    assert bool(codec.admits((8, 72))) == bool(FORMATS[name].rotated)
    assert codec.admits((8, 128)) is None


@pytest.mark.parametrize("shape", [(6, 200), (16, 64)])
@pytest.mark.parametrize("name, options", CASES)
def test_file_specs_are_what_is_stored(name, options, shape):
    if make_codec(name, **options).admits(shape):
        return
    made = quantize_weight(torch.randn(shape, generator=torch.Generator().manual_seed(0)), name, **options)
    tensors = made.tensors("a")
    specs = made.codec.file_specs(shape)
    assert {f"a.{suffix}": (spec.dtype, spec.shape) for suffix, spec in specs.items()} == {
        key: (tensor.dtype, tuple(tensor.shape)) for key, tensor in tensors.items()
    }


@pytest.mark.parametrize("bits, kitchen", [(4, None), (6, "0.2.36")])
def test_asym_w4a8_layers_are_int8_layers_of_the_same_values(bits, kitchen):
    """What ComfyUI's loaders get where comfy-kitchen is too old."""
    weight = torch.randn((6, 256), generator=torch.Generator().manual_seed(0))
    made = quantize_weight(weight, "asym_w4a8_int8", bits=bits, convrot=64)
    assert made.codec.kitchen_since == kitchen
    parts = {name.removeprefix("a."): tensor for name, tensor in made.tensors("a").items()}
    int8 = {"weight": made.codec.decode_int8(parts), "weight_scale": parts["weight_s_channel"].reshape(-1, 1)}
    codec = make_codec("int8_tensorwise", "row", convrot=64)
    assert all(spec.matches(int8[suffix]) for suffix, spec in codec.specs((6, 256)).items())
    expected = made.codec.dequantize(parts, (6, 256))
    assert torch.equal(codec.dequantize(int8, (6, 256)), expected)
    assert 0 < (expected - weight).norm() / weight.norm() < 0.1
