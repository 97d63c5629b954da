"""Codecs: every choice that a format leaves open has an effect, and survives as JSON and in a file."""

import pytest
import torch

from learned_rounding.quant_core import FORMATS, quantize_weight
from learned_rounding.quant_core.errors import RecipeError
from learned_rounding.quant_core.formats import READABLE, detect_layer, make_codec
from learned_rounding.quant_core.formats.codec import TensorSpec, read_count
from learned_rounding.tests.quant_core.formats.weights import HARD, hessian_of, parts_of, random

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
ROUNDINGS = ("nearest", "auto", "stochastic", "principal", "calibrated")
# Each format, and each way in which one stores its values.
STORED = [
    *((name, {}) for name in FORMATS),
    ("int8_tensorwise", {"granularity": "tensor"}),
    ("asym_w4a8_int8", {"bits": 6}),
    ("convrot_w4a4", {"linear_dtype": "int4"}),
]


def test_the_json_gives_the_codec_back(subtests):
    for name, options in CASES:
        codec = make_codec(name, **options)
        read = type(codec).from_config(codec.format, codec.config, codec.granularity)
        with subtests.test(name, **options):
            assert read.of_tensors(codec.specs((64, 512)).get) == codec
            assert codec.config["format"] == name


def test_choices_without_effect_are_refused(subtests, sentences):
    for name, options in (
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
    ):
        with subtests.test(name, **options), sentences.raises(RecipeError):
            make_codec(name, **options)


def test_the_text_has_everything_that_was_chosen():
    assert str(make_codec("int8_tensorwise", convrot=64)) == "int8_tensorwise per row, ConvRot 64"
    assert str(make_codec("int8_blockwise", block_size=32)) == "int8_blockwise per block of 32"


def test_formats_with_an_activation_granularity_quantize_activations(subtests):
    for name, entry in READABLE.items():
        with subtests.test(name):
            assert make_codec(name).quantizes_activations() == (entry.activations is not None)


def test_no_activations_are_quantized_where_the_card_cannot(subtests):
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    for name, entry in READABLE.items():
        if entry.native_since > (0, 0):
            with subtests.test(name):
                assert torch.equal(make_codec(name).quantize_activations(x, (entry.native_since[0] - 1, 9)), x)


def test_activations_are_quantized_to_the_elements_of_the_format(subtests):
    """Each token, block or group by its own largest magnitude; a static scale is 1 until it is calibrated."""
    x = torch.randn(5, 80, generator=torch.Generator().manual_seed(0)) * torch.logspace(-2, 2, 5)[:, None]
    for name, entry in FORMATS.items():
        codec = make_codec(name)
        made, elements = codec.quantize_activations(x), codec.activation_elements()
        with subtests.test(name):
            if entry.activations is None:
                assert torch.equal(made, x)
            elif entry.activations == "tensor":
                assert torch.equal(made, elements.encode(x.clone()).float())
            elif entry.activations == "token":
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


def test_only_rotated_formats_refuse_channels_that_no_rotation_divides(subtests):
    for name, entry in FORMATS.items():
        codec = make_codec(name, convrot=64) if entry.rotated else make_codec(name)
        with subtests.test(name):
            assert bool(codec.admits((8, 72))) == bool(entry.rotated)
            assert codec.admits((8, 128)) is None


def test_an_always_rotated_format_without_a_rotation_is_refused():
    assert "no ConvRot group divides" in make_codec("convrot_w4a4").admits((8, 64))


def test_file_specs_are_what_is_stored(subtests):
    for name, options in CASES:
        codec = make_codec(name, **options)
        shape = (6, 256) if codec.admits((6, 200)) else (6, 200)
        specs = {f"a.{suffix}": (spec.dtype, spec.shape) for suffix, spec in codec.file_specs(shape).items()}
        with subtests.test(name, **options):
            tensors = quantize_weight(random(shape), name, rounding="nearest", **options).tensors("a")
            assert specs == {key: (tensor.dtype, tuple(tensor.shape)) for key, tensor in tensors.items()}


def test_the_file_dequantizes_to_the_result(subtests):
    """Each format with each weight, under one rounding after the other; the last shape has more than a tile of scales."""
    for number, (name, options) in enumerate(STORED):
        cases = [(make, (20, 64), ROUNDINGS[(number + index) % 5]) for index, make in enumerate(HARD)]
        for make, shape, rounding in (*cases, (random, (130, 320), "nearest")):
            hessian = hessian_of(shape[1]) if rounding == "calibrated" else None
            made = quantize_weight(make(shape), name, rounding=rounding, hessian=hessian, **options)
            parts = parts_of(made)
            read = detect_layer("a", made.config, made.tensors("a"))
            with subtests.test(f"{name}, {make.__name__}, {rounding}", **options):
                assert read == made.codec
                assert read.weight_shape(tuple(parts["weight"].shape), made.config) == shape
                assert torch.equal(read.dequantize(parts, shape), made.dequantize())
                assert torch.isfinite(made.dequantize()).all()


def test_counts_of_the_json_are_positive_integers(subtests):
    assert read_count({}, "group_size", 128) == 128
    assert read_count({"group_size": 64}, "group_size", 128) == 64
    for value in (0, -1, 64.0, True, "64", None):
        with subtests.test(value=value), pytest.raises(ValueError, match="must have a positive integer"):
            read_count({"group_size": value}, "group_size", 128)


def test_a_spec_matches_its_own_dtype_and_views_alone():
    spec = TensorSpec(torch.uint8, (2, 3), views=(torch.float8_e4m3fn,))
    assert spec.matches(torch.zeros(2, 3, dtype=torch.uint8))
    assert spec.matches(torch.zeros(2, 3).to(torch.float8_e4m3fn))
    assert not spec.matches(torch.zeros(2, 3))
    assert not spec.matches(torch.zeros(3, 2, dtype=torch.uint8))
    assert not spec.matches(None)


def test_a_spec_counts_bytes():
    assert TensorSpec(torch.float32, (2, 3)).nbytes == 24
