"""W4A8 and W6A8: bytes as the description has them, and what comfy-kitchen makes and computes."""

import inspect
from dataclasses import replace

import pytest
import torch

from learned_rounding.quant_core import quantize_weight
from learned_rounding.quant_core.formats import QuantizedWeight, make_codec
from learned_rounding.tests.quant_core.formats.weights import (
    HARD,
    correlated_hessian,
    groups_of_all_sizes,
    heavy_tails,
    hessian_of,
    parts_of,
    random,
    raw,
    stored_values,
)

BITS = (4, 6)
both_sizes = pytest.mark.parametrize("bits", BITS)


def quantize(bits: int, weight: torch.Tensor, rounding: str = "nearest", **inputs) -> QuantizedWeight:
    if rounding == "calibrated":
        inputs = {"hessian": hessian_of(weight.shape[1])} | inputs
    return quantize_weight(weight, "asym_w4a8_int8", rounding=rounding, bits=bits, **inputs)


def rotate(weight: torch.Tensor) -> torch.Tensor:
    """The weight in the stored basis, and back."""
    return quantize(4, weight).codec.rotation.apply(weight)


def levels_of(made: QuantizedWeight) -> torch.Tensor:
    """All levels, float32 (rows, groups, codes)."""
    levels = made.solution.levels
    return (levels.scale[..., None] * levels.codes).round().clamp(-127, 127)


def read_value(parts, row: int, column: int) -> torch.Tensor:
    stored, channels = parts["weight"].view(torch.uint8), parts["weight_s_rel"].shape[1] * 16
    code = stored[row, column // 2].item() >> 4 * (column % 2) & 15
    if "weight_codebook" in parts:
        code = parts["weight_codebook"][code]
    else:
        upper = stored[row, channels // 2 + column // 4].item() >> 2 * (column % 4) & 3
        code = float((upper << 4 | code) - 32)
    level = (code * parts["weight_s_rel"][row, column // 16].float()).round().clamp(-127, 127)
    return level * parts["weight_s_channel"][row]


@both_sizes
def test_each_value_is_at_the_byte_of_the_description(subtests, bits):
    for make in HARD:
        made = quantize(bits, rotate(make((12, 64))), "auto")
        parts = parts_of(made)
        values = torch.tensor([[read_value(parts, row, column) for column in range(64)] for row in range(12)])
        with subtests.test(make.__name__):
            assert torch.equal(values, stored_values(made))


@both_sizes
def test_stored_indices_are_the_lowest_of_equal_levels(bits):
    """Then a file depends on its values alone, not on the way to them."""
    made = quantize(bits, rotate(groups_of_all_sizes((16, 64))), "auto")
    indices = made.solution.levels.indices(made.qdata).long().unflatten(1, (-1, 16))
    values, below = (levels_of(made).gather(-1, index.clamp(min=0)).flatten(1) for index in (indices, indices - 1))
    assert torch.equal(values, made.qdata.float())
    assert ((below < values) | (indices.flatten(1) == 0)).all()


def test_channels_that_fill_no_group_are_refused(subtests):
    for bits, channels in ((4, 24), (4, 8), (6, 48)):
        with subtests.test(bits=bits, channels=channels):
            reason = make_codec("asym_w4a8_int8", bits=bits, convrot=16).admits((8, channels))
            assert "are not a multiple of" in reason


@both_sizes
def test_groups_whose_scale_vanishes_lose_no_more_than_their_values(subtests, bits):
    weight = groups_of_all_sizes((24, 256))
    for rounding in ("nearest", "auto"):
        made = quantize(bits, rotate(weight), rounding)
        scales = made.codec.scale_values("weight_s_rel", parts_of(made)["weight_s_rel"], (24, 256))
        with subtests.test(rounding):
            assert torch.isfinite(scales).all()
            assert (scales == 0).any()
            assert ((scales > 0) & (scales < 2.0**-6)).any()
            lost = stored_values(made).sub_(rotate(rotate(weight))).unflatten(1, (-1, 16))
            # Values of a group whose scale vanishes become zero, those of others are within half a step.
            largest = weight.unflatten(1, (-1, 16)).abs().amax(-1)
            unit = made.scale.reshape(24, -1)[:, :1]
            assert (lost.abs().amax(-1) <= largest.maximum(unit) * (1 + 1e-3)).all()


def test_the_error_is_that_of_the_number_of_bits(subtests):
    """Relative error of Gaussian weights by round to nearest; the search lowers it."""
    weight = random((48, 3072))
    for bits, nearest, searched in ((4, 0.073, 0.071), (6, 0.023, 0.0201)):
        with subtests.test(bits=bits):
            assert quantize(bits, weight, "nearest").weight_error == pytest.approx(nearest, rel=0.02)
            assert quantize(bits, weight, "auto").weight_error == pytest.approx(searched, rel=0.02)


def test_gptq_lowers_the_output_error(subtests):
    hessian = correlated_hessian()
    for bits, gain in ((4, 0.75), (6, 0.8)):
        nearest, calibrated = (
            quantize(bits, random((48, 64)), rounding, hessian=hessian).output_error
            for rounding in ("nearest", "calibrated")
        )
        with subtests.test(bits=bits):
            assert calibrated < gain * nearest


@both_sizes
def test_layers_are_int8_layers_of_the_same_values(bits):
    """What ComfyUI's loaders get where comfy-kitchen is too old."""
    weight = torch.randn((6, 256), generator=torch.Generator().manual_seed(0))
    made = quantize_weight(weight, "asym_w4a8_int8", bits=bits, convrot=64)
    parts = parts_of(made)
    int8 = {"weight": made.codec.decode_int8(parts), "weight_scale": parts["weight_s_channel"].reshape(-1, 1)}
    codec = make_codec("int8_tensorwise", "row", convrot=64)
    assert [suffix for suffix, spec in codec.specs((6, 256)).items() if not spec.matches(int8[suffix])] == []
    expected = made.codec.dequantize(parts, (6, 256))
    assert torch.equal(codec.dequantize(int8, (6, 256)), expected)
    assert 0 < (expected - weight).norm() / weight.norm() < 0.1


def test_six_bits_need_a_newer_comfy_kitchen():
    assert make_codec("asym_w4a8_int8", bits=4).kitchen_since is None
    assert make_codec("asym_w4a8_int8", bits=6).kitchen_since == "0.2.36"


def test_scales_that_contradict_the_group_size_are_refused():
    made = quantize(4, random((8, 64)))
    parts = parts_of(made) | {"weight_s_rel": torch.ones(8, 3)}
    with pytest.raises(ValueError, match="group_size 16 contradicts 3 scales for 64 columns"):
        made.codec.dequantize(parts, (8, 64))


# comfy-kitchen


@pytest.fixture
def eager():
    """comfy-kitchen's W4A8 module in plain torch."""
    return pytest.importorskip("comfy_kitchen.backends.eager.w4a8_int8")


def kitchen_options(eager, bits: int) -> dict[str, object]:
    """How its quantizer is called for round to nearest; skips where the installed comfy-kitchen has no 6 bits."""
    if bits == 4:
        return {}
    if "bits" not in inspect.signature(eager.quantize_w4a8_int8_weight).parameters:
        pytest.skip("this comfy-kitchen has no 6 bits")
    return {"bits": 6, "scale_search": False}


def quantize_in_kitchen(eager, bits: int, rotated: torch.Tensor) -> dict[str, torch.Tensor]:
    """What comfy-kitchen makes of a rotated weight, whose rotation differs from this project's in the last bit."""
    packed, relative, channel, correction, codebook = eager._quantize_w4a8_chunked(
        rotated, lambda rows, _: rows, 16, 16, True, torch.float8_e4m3fn, True, **kitchen_options(eager, bits)
    )
    assert correction is None
    tensors = {"weight": packed, "weight_s_rel": relative, "weight_s_channel": channel}
    return tensors if codebook is None else tensors | {"weight_codebook": codebook}


def dequantize_in_kitchen(eager, parts) -> torch.Tensor:
    """The weight in the rotated basis, float32."""
    codebook, channel = parts.get("weight_codebook"), parts["weight_s_channel"]
    int8 = eager._dequant_int4_grouped_to_int8(parts["weight"], parts["weight_s_rel"], codebook, 16)
    return eager._dequantize_w4a8_int8_weight_from_int8(int8, channel, None, 16, torch.float32)


def unpack_indices(packed: torch.Tensor, made: QuantizedWeight) -> torch.Tensor:
    """The indices of levels less a constant: the weight of unit scales without a codebook or rotation."""
    rows, columns = made.shape
    parts = {"weight": packed, "weight_s_rel": torch.ones(rows, columns // 16), "weight_s_channel": torch.ones(rows)}
    return replace(made.codec, rotation=None).dequantize(parts, made.shape)


def assert_equal_to_kitchen(eager, bits: int, weight: torch.Tensor) -> None:
    """Of equal levels a file has the lowest index here, and either there."""
    made = quantize(bits, weight)
    ours, theirs = parts_of(made), quantize_in_kitchen(eager, bits, made.codec.rotation.apply(weight))
    assert ours.keys() - {"comfy_quant"} == theirs.keys()
    different = [key for key in theirs if key != "weight" and not torch.equal(raw(ours[key]), raw(theirs[key]))]
    assert different == []
    assert torch.equal(dequantize_in_kitchen(eager, theirs), stored_values(made))
    distinct = (levels_of(made).diff(dim=-1) > 0).all(-1).repeat_interleave(16, dim=1)
    indices = [unpack_indices(parts["weight"], made)[distinct] for parts in (ours, theirs)]
    assert len(indices[0])
    assert torch.equal(*indices)


@both_sizes
def test_nearest_equals_comfy_kitchen(subtests, eager, bits):
    shapes = ((32, 512), (20, 64), (130, 320))
    for index, make in enumerate(HARD):
        with subtests.test(make.__name__):
            assert_equal_to_kitchen(eager, bits, make(shapes[index % 3]))


@pytest.mark.soak
@both_sizes
def test_nearest_equals_comfy_kitchen_for_rows_that_do_not_fit_its_chunks(eager, bits):
    assert_equal_to_kitchen(eager, bits, heavy_tails((2100, 2048)))


@both_sizes
def test_comfy_kitchen_dequantizes_to_the_same_values(subtests, eager, bits):
    kitchen_options(eager, bits)
    roundings = ("nearest", "auto", "stochastic", "principal", "calibrated", "auto")
    for make, rounding in zip(HARD, roundings, strict=True):
        made = quantize(bits, make((48, 320)), rounding)
        with subtests.test(make.__name__, rounding=rounding):
            assert torch.equal(dequantize_in_kitchen(eager, parts_of(made)), stored_values(made))


def test_fitted_codes_ascend_where_comfy_kitchens_do_not(eager):
    """Its codes that start from equal quantiles, as those of many zeros, cross, and are searched as if they ascended."""
    weight = random((64, 256)) ** 5 * 1e3
    weight[::2] = 0
    made = quantize(4, weight)
    rotated = made.codec.rotation.apply(weight)
    theirs = quantize_in_kitchen(eager, 4, rotated)
    assert torch.equal(made.solution.levels.codes, theirs["weight_codebook"].sort().values)
    assert not torch.equal(made.solution.levels.codes, theirs["weight_codebook"])
    ours, other = ((values - rotated).norm() for values in (stored_values(made), dequantize_in_kitchen(eager, theirs)))
    assert ours < other


@both_sizes
def test_outputs_equal_those_of_comfy_kitchen(subtests, eager, bits):
    """Within rounding: comfy-kitchen rotates activations in their dtype, which moves some of them to the next INT8."""
    kitchen_options(eager, bits)
    made, bias = quantize(bits, random((96, 512))), random((96,), 6)
    parts, rotation = parts_of(made), made.codec.rotation
    for dtype, tolerance in ((torch.float32, 2e-3), (torch.bfloat16, 2e-2)):
        x = random((40, 512), 5).to(dtype)
        expected = eager.w4a8_int8_linear(
            x,
            *(parts[key] for key in ("weight", "weight_s_rel", "weight_s_channel")),
            parts.get("weight_codebook"),
            bias=bias,
            convrot_groupsize=rotation.size,
            out_dtype=torch.float32,
        )
        output = torch.nn.functional.linear(made.codec.quantize_activations(x), made.dequantize(), bias)
        with subtests.test(str(dtype)):
            assert (output - expected).norm() < tolerance * expected.norm()
