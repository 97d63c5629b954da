"""Scales: groups, representable numbers, and precision where ComfyUI casts them to the dtype of the activations."""

from itertools import product

import pytest
import torch

from learned_rounding.quant_core import quantize_weight
from learned_rounding.quant_core.formats import E4M3, E5M2, GRANULARITIES, ScaleGroups
from learned_rounding.quant_core.formats.scales import E8M0, FLOAT32, TWO_LEVEL_E4M3

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MAGNITUDES = (50.0, 0.5, 0.02, 0.005, 5e-4, 1e-4, 1e-5)  # standard deviations
FP8 = {"float8_e4m3fn": E4M3, "float8_e5m2": E5M2}
# Format, granularity, and the relative error of round to nearest of normally distributed weights.
FORMATS = (
    ("float8_e4m3fn", "tensor", 0.0265),
    ("float8_e5m2", "tensor", 0.053),
    ("int8_tensorwise", "row", 0.0080),
    ("int8_tensorwise", "tensor", 0.0105),
    ("nvfp4", "group", 0.096),
)


def random(magnitude: float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (torch.randn(32, 256, generator=torch.Generator().manual_seed(0)) * magnitude).to(dtype)


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


def decode_as_comfyui(quantized, dtype: torch.dtype) -> torch.Tensor:
    """The weight as comfy-kitchen dequantizes it for activations of ``dtype``."""
    kitchen = pytest.importorskip("comfy_kitchen")
    parts = {name.removeprefix("a."): tensor for name, tensor in quantized.tensors("a").items()}
    weight, scale = parts["weight"], parts["weight_scale"]
    with kitchen.use_backend("eager"):
        if quantized.format.name == "nvfp4":
            return kitchen.dequantize_nvfp4(weight, parts["weight_scale_2"], scale, dtype)
        if quantized.format.name in FP8:
            return kitchen.dequantize_per_tensor_fp8(weight, scale, dtype)
        return kitchen.dequantize_int8_simple(weight, scale).to(dtype)


def test_weights_survive_in_the_dtype_of_the_activations(subtests):
    """Every magnitude in every format, under either rounding in turn."""
    for number, (format, granularity, expected) in enumerate(FORMATS):
        for index, (dtype, magnitude) in enumerate(product(DTYPES, MAGNITUDES)):
            weight = random(magnitude, dtype)
            rounding = ("nearest", "auto")[(number + index) % 2]
            quantized = quantize_weight(weight, format, granularity=granularity, rounding=rounding)
            with subtests.test(format, granularity=granularity, dtype=dtype, magnitude=magnitude, rounding=rounding):
                # float16 cannot hold weights of 1e-5 more precisely, nor can bfloat16 hold a scale of more than 8 bits.
                assert relative(decode_as_comfyui(quantized, dtype), weight) < 1.06 * expected


def test_scales_are_normal_in_float16_and_move_by_whole_octaves(subtests):
    tiny = torch.finfo(torch.float16).tiny
    for format, elements in FP8.items():
        for magnitude in MAGNITUDES:
            weight = random(magnitude)
            scale = float(quantize_weight(weight, format, rounding="nearest").scale)
            octaves = torch.tensor(scale / float(weight.abs().max() / elements.max)).log2()
            with subtests.test(format, magnitude=magnitude):
                assert scale >= tiny
                assert octaves == octaves.round()
                assert octaves == 0 or scale < 2 * tiny  # no more than necessary


def test_scales_of_ordinary_layers_are_not_raised(subtests):
    for magnitude in (0.02, 0.5):
        weight = random(magnitude)
        fp8 = quantize_weight(weight, "float8_e4m3fn", rounding="nearest")
        nvfp4 = quantize_weight(weight, "nvfp4", rounding="nearest").tensors("a")
        scale = weight.abs().max() / 448
        with subtests.test(magnitude=magnitude):
            assert torch.equal(fp8.scale.reshape(()), scale)
            assert torch.equal(fp8.qdata.view(torch.uint8), (weight / scale).to(torch.float8_e4m3fn).view(torch.uint8))
            assert torch.equal(nvfp4["a.weight_scale_2"], weight.abs().max() / (448 * 6))


def test_a_raised_scale_keeps_the_values():
    """All of these E5M2 scales are subnormal in float16."""
    weight = random(0.02)
    scale = weight.abs().max() / E5M2.max
    quantized = quantize_weight(weight, "float8_e5m2", rounding="nearest")
    assert float(quantized.scale) > float(scale)
    assert torch.equal(quantized.dequantize(), (weight / scale).to(torch.float8_e5m2).float() * scale)


def test_weights_below_float16_keep_their_precision(subtests):
    """A bfloat16 model may have them; three octaves of normal elements stay below the largest one."""
    for format, error in {"float8_e4m3fn": 0.029, "float8_e5m2": 0.06, "nvfp4": 0.1}.items():
        with subtests.test(format):
            assert quantize_weight(random(1e-9), format, rounding="nearest").weight_error < error


def test_a_layer_of_zeros_has_the_scale_one(subtests):
    for format in FP8:
        with subtests.test(format):
            assert float(quantize_weight(torch.zeros(4, 8), format, rounding="nearest").scale) == 1


# Groups

GROUPS = ScaleGroups(5, 7, 2, 3)  # the last group along either side is smaller


def test_the_last_group_may_be_smaller():
    assert GROUPS.counts == (3, 3)


def test_granularities_divide_a_weight_into_groups(subtests):
    for granularity, counts in (("tensor", (1, 1)), ("row", (5, 1)), ("block", (2, 2)), ("group", (5, 2))):
        with subtests.test(granularity):
            assert GRANULARITIES[granularity](5, 7, 4).counts == counts


def test_each_weight_gets_the_scale_of_its_group():
    scale = torch.arange(9.0).view(3, 3)
    spread = GROUPS.spread(scale)
    assert spread.shape == (5, 7)
    assert spread.tolist() == [[float(scale[r // 2, c // 3]) for c in range(7)] for r in range(5)]
    assert torch.equal(GROUPS.spread(scale, 1, 4), spread[1:4])


def test_row_amax_is_the_largest_magnitude_of_a_row_in_each_group():
    rows = torch.tensor([[1.0, -2.0, 3.0, 4.0, -5.0, 0.0, -7.0]])
    assert GROUPS.row_amax(rows).tolist() == [[3, 5, 7]]


def test_rows_of_a_group_are_joined():
    values = torch.arange(15.0).view(5, 3)
    assert GROUPS.join_rows(values, torch.amax).tolist() == [[3, 4, 5], [9, 10, 11], [12, 13, 14]]


# Scale formats


def test_e8m0_scales_are_powers_of_two_that_clamp_nothing():
    amax = torch.tensor([[448.0, 449.0, 1.0, 0.0]])
    scale, parent = E8M0.from_amax(amax, 448.0)
    assert scale.tolist() == [[1.0, 2.0, 2.0**-8, 0.0]]
    assert parent is None


def test_e8m0_snaps_to_the_nearest_power():
    assert E8M0.snap(torch.tensor([1.3, 1.5, 0.0]), None).tolist() == [1, 2, 0]


def test_two_level_scales_are_e4m3_under_the_scale_of_the_tensor():
    scale, parent = TWO_LEVEL_E4M3.from_amax(torch.tensor([[6.0, 3.0, 1e-9]]), 6.0)
    assert float(parent) == pytest.approx(1 / 448)
    assert (scale / parent).flatten().tolist() == pytest.approx([448, 224, 0])


def test_a_float32_scale_is_never_zero():
    scale, _ = FLOAT32.from_amax(torch.tensor([[0.0, 1e-45, 127.0]]), 127.0)
    assert scale.tolist() == [[1.0, torch.finfo(torch.float32).tiny, 1.0]]


def test_the_amax_scale_is_the_first_that_a_search_tries(subtests):
    for scales in (FLOAT32, E8M0, TWO_LEVEL_E4M3):
        for floating in (True, False):
            with subtests.test(type(scales).__name__, floating=floating):
                assert scales.ratios(floating)[0] == 1
