"""Formats below 8 bits and MXFP8: bytes as their description has them, and what comfy-kitchen makes and computes."""

import inspect
from dataclasses import replace

import pytest
import torch

from learned_rounding.quant_core import quantize_weight
from learned_rounding.quant_core.errors import NonFiniteWeightError
from learned_rounding.quant_core.formats import QuantizedWeight, detect_layer, make_codec

CODECS = {
    "w4a8": ("asym_w4a8_int8", {"bits": 4}),
    "w6a8": ("asym_w4a8_int8", {"bits": 6}),
    "w4a4-int8": ("convrot_w4a4", {"linear_dtype": "int8"}),
    "w4a4-int4": ("convrot_w4a4", {"linear_dtype": "int4"}),
    "nvfp4": ("nvfp4", {}),
    "mxfp8": ("mxfp8", {}),
}
ROTATED = ("w4a8", "w6a8", "w4a4-int8", "w4a4-int4")
LEVELS = ("w4a8", "w6a8")
ROUNDINGS = ("nearest", "auto", "stochastic", "principal", "calibrated")
SHAPES = ((32, 512), (20, 64), (130, 320))


def quantize(name: str, weight: torch.Tensor, rounding: str = "nearest", **inputs) -> QuantizedWeight:
    format, options = CODECS[name]
    if rounding == "calibrated":
        inputs = {"hessian": hessian_of(weight.shape[1])} | inputs
    return quantize_weight(weight, format, rounding=rounding, **options, **inputs)


def parts_of(made: QuantizedWeight) -> dict[str, torch.Tensor]:
    return {key.removeprefix("a."): tensor for key, tensor in made.tensors("a").items()}


def raw(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def hessian_of(channels: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(2 * channels, channels, generator=generator) * torch.logspace(0, -1, channels)
    return x.t() @ x / len(x)


def stored_values(made: QuantizedWeight) -> torch.Tensor:
    """The dequantized weight before the rotation to the original basis."""
    return made.codec.solve_space(made.shape).decode(made.qdata, made.scale)


def levels_of(made: QuantizedWeight) -> torch.Tensor:
    """All levels, float32 (rows, groups, codes)."""
    levels = made.solution.levels
    return (levels.scale[..., None] * levels.codes).round().clamp(-127, 127)


def rotate(name: str, weight: torch.Tensor) -> torch.Tensor:
    """The weight in the stored basis, and back."""
    if name not in ROTATED:
        return weight
    rotation = quantize(name, weight).codec.rotation
    assert rotation is not None
    return rotation.apply(weight)


# --------------------------------------------------------------------------- weights, in the basis that is stored


def random(shape, seed=0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.05


def rows_of_all_sizes(shape) -> torch.Tensor:
    return random(shape) * torch.logspace(-5, 3, shape[0])[:, None]


def groups_of_all_sizes(shape) -> torch.Tensor:
    """Magnitudes of groups over 30 octaves in a row: scales are subnormal in E4M3, or round to zero."""
    exponents = torch.randint(-30, 1, (shape[0], shape[1] // 16), generator=torch.Generator().manual_seed(1))
    return torch.ldexp(random(shape), exponents.repeat_interleave(16, dim=1))


def heavy_tails(shape) -> torch.Tensor:
    return random(shape) ** 5 * 1e3


def with_zeros(shape) -> torch.Tensor:
    """A row and groups of zeros; of more, W4A8's codes would be fitted."""
    weight = random(shape)
    weight[3] = 0
    weight[7, : shape[1] // 2] = 0
    return weight


def with_outlier(shape) -> torch.Tensor:
    weight = random(shape)
    weight[-1, -1] = 3e4
    return weight


WEIGHTS = (random, rows_of_all_sizes, groups_of_all_sizes, heavy_tails, with_zeros, with_outlier)
made_by = pytest.mark.parametrize("make", WEIGHTS, ids=lambda make: make.__name__)


# ------------------------------------------------------------------------------------------- the description


def read_asym(parts, row: int, column: int) -> torch.Tensor:
    raw, channels = parts["weight"].view(torch.uint8), parts["weight_s_rel"].shape[1] * 16
    code = raw[row, column // 2].item() >> 4 * (column % 2) & 15
    if "weight_codebook" in parts:
        code = parts["weight_codebook"][code]
    else:
        upper = raw[row, channels // 2 + column // 4].item() >> 2 * (column % 4) & 3
        code = float((upper << 4 | code) - 32)
    level = (code * parts["weight_s_rel"][row, column // 16].float()).round().clamp(-127, 127)
    return level * parts["weight_s_channel"][row]


def read_convrot(parts, row: int, column: int) -> torch.Tensor:
    code = parts["weight"].view(torch.uint8)[row, column // 2].item() >> 4 * (column % 2) & 15
    return parts["weight_scale"][row] * (code if code < 8 else code - 16)


def find_scale(tiled: torch.Tensor, row: int, group: int) -> torch.Tensor:
    """The scale of a group in the block layout of cuBLAS."""
    tile = row // 128 * (tiled.shape[1] // 4) + group // 4
    return tiled.flatten()[tile * 512 + row % 32 * 16 + row // 32 % 4 * 4 + group % 4]


def read_nvfp4(parts, row: int, column: int) -> torch.Tensor:
    code = parts["weight"][row, column // 2].item() >> 4 * (1 - column % 2) & 15
    magnitude = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)[code & 7]
    scale = find_scale(parts["weight_scale"], row, column // 16).float() * parts["weight_scale_2"]
    return scale * (-magnitude if code & 8 else magnitude)


def read_mxfp8(parts, row: int, column: int) -> torch.Tensor:
    exponent = find_scale(parts["weight_scale"], row, column // 32).item()
    return torch.tensor(2.0 ** (exponent - 127) if exponent else 0.0) * parts["weight"][row, column].float()


READERS = {
    "asym_w4a8_int8": read_asym,
    "convrot_w4a4": read_convrot,
    "nvfp4": read_nvfp4,
    "mxfp8": read_mxfp8,
}


@made_by
@pytest.mark.parametrize("name", CODECS)
def test_each_value_is_at_the_byte_of_the_description(name, make):
    made = quantize(name, rotate(name, make((20, 64))), "auto")
    read, parts = READERS[made.format.name], parts_of(made)
    values = torch.tensor([[read(parts, row, column) for column in range(64)] for row in range(20)])
    assert torch.equal(values, stored_values(made))


@pytest.mark.parametrize(
    "rounding, shape", [*((rounding, (20, 64)) for rounding in ROUNDINGS), ("calibrated", (130, 320))]
)
@made_by
@pytest.mark.parametrize("name", CODECS)
def test_the_file_dequantizes_to_the_result(name, make, rounding, shape):
    made = quantize(name, make(shape), rounding)
    parts = parts_of(made)
    read = detect_layer("a", made.config, made.tensors("a"))
    assert read == made.codec
    assert read.weight_shape(tuple(parts["weight"].shape), made.config) == shape
    assert torch.equal(read.dequantize(parts, shape), made.dequantize())
    assert torch.isfinite(made.dequantize()).all()


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("name", CODECS)
def test_the_same_seed_gives_the_same_bytes(name, rounding):
    files = [parts_of(quantize(name, random((40, 320)), rounding, seed=3)) for _ in range(2)]
    for key, tensor in files[0].items():
        assert torch.equal(raw(tensor), raw(files[1][key]))


@pytest.mark.parametrize("name", LEVELS)
def test_stored_indices_are_the_lowest_of_equal_levels(name):
    """Then a file depends on its values alone, not on the way to them."""
    made = quantize(name, rotate(name, groups_of_all_sizes((16, 64))), "auto")
    indices = made.solution.levels.indices(made.qdata).long().unflatten(1, (-1, 16))
    values, below = (levels_of(made).gather(-1, index.clamp(min=0)).flatten(1) for index in (indices, indices - 1))
    assert torch.equal(values, made.qdata.float())
    assert ((below < values) | (indices.flatten(1) == 0)).all()


@pytest.mark.parametrize("name, unit", [("nvfp4", 16), ("mxfp8", 32)])
def test_padding_is_zero(name, unit):
    made = quantize(name, random((unit + 1, 3 * unit + 1)))
    parts, item = parts_of(made), 2 if name == "nvfp4" else 1
    assert parts["weight"].shape == (2 * unit, 4 * unit // item)
    raw = parts["weight"].view(torch.uint8)
    assert not raw[unit + 1 :].any() and not raw[:, (3 * unit + 1 + item) // item :].any()
    assert parts["weight_scale"].shape == (128, 4)


@pytest.mark.parametrize("name, channels", [("w4a8", 24), ("w6a8", 48), ("w4a4-int8", 96), ("w4a8", 8)])
def test_formats_without_padding_refuse_other_shapes(name, channels):
    format, options = CODECS[name]
    assert "are not a multiple of" in make_codec(format, convrot=16, **options).admits((8, channels))


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("name", CODECS)
def test_rows_and_groups_of_zeros_stay_zero(name, rounding):
    weight = random((12, 512))
    weight[2] = 0
    weight[5, 256:] = 0
    result = quantize(name, weight, rounding).dequantize()
    assert not result[2].any() and result[5, :256].any()
    if rounding in ("nearest", "auto", "stochastic"):  # others compensate errors of the other group
        assert not result[5, 256:].any()
    assert not quantize(name, torch.zeros(4, 64), rounding).dequantize().any()


@pytest.mark.parametrize("rounding", ("nearest", "auto", "calibrated"))
@pytest.mark.parametrize("name", CODECS)
def test_an_outlier_does_not_harm_other_rows(name, rounding):
    """NVFP4 has one scale of the tensor for all rows, so that their scales lose bits; those of others are theirs alone."""
    weight = random((12, 512))
    weight[4, 9] = 3e3
    result = quantize(name, weight, rounding).dequantize()
    assert float((result[4] - weight[4]).norm() / weight[4].norm()) < 0.2
    others = torch.arange(12) != 4
    plain = quantize(name, weight[others], rounding).dequantize()
    error, expected = ((values - weight[others]).norm() for values in (result[others], plain))
    assert error < (1.3 if name == "nvfp4" else 1.01) * expected


@pytest.mark.parametrize("rounding", ("nearest", "auto"))
@pytest.mark.parametrize("name", (*LEVELS, "nvfp4"))
def test_groups_whose_scale_vanishes_lose_no_more_than_their_values(name, rounding):
    weight = groups_of_all_sizes((64, 512))
    made = quantize(name, rotate(name, weight), rounding)
    scales = made.codec.scale_values(
        *next((key, tensor) for key, tensor in parts_of(made).items() if key in ("weight_s_rel", "weight_scale")),
        (64, 512),
    )
    assert (scales >= 0).all() and torch.isfinite(scales).all()
    assert (scales == 0).any() and ((scales > 0) & (scales < 2.0**-6)).any()
    grouped = stored_values(made).sub_(rotate(name, rotate(name, weight))).unflatten(1, (-1, 16))
    # Values of a group whose scale vanishes become zero, those of others are within half a step.
    largest = weight.unflatten(1, (-1, 16)).abs().amax(-1)
    unit = made.scale.reshape(64, -1)[:, :1] if name in LEVELS else torch.zeros(1)
    assert (grouped.abs().amax(-1) <= largest.maximum(unit) * (1 + 1e-3)).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("name", CODECS)
def test_weights_that_are_not_finite_are_refused(name, rounding, value):
    weight = random((8, 64))
    weight[3, 5] = value
    with pytest.raises(NonFiniteWeightError):
        quantize(name, weight, rounding)


@pytest.mark.parametrize(
    "name, error, searched", [("w4a8", 0.073, 0.071), ("w6a8", 0.023, 0.0201), ("w4a4-int8", 0.155, 0.114)]
)
def test_round_to_nearest_has_the_error_of_the_format(name, error, searched):
    """Relative error of Gaussian weights; the search lowers it."""
    weight = random((256, 3072))
    errors = [quantize(name, weight, rounding).weight_error for rounding in ("nearest", "auto")]
    assert errors == pytest.approx([error, searched], rel=0.02)


@pytest.mark.parametrize("name, gain", [("w4a8", 0.75), ("w6a8", 0.8), ("w4a4-int8", 0.75)])
def test_gptq_lowers_the_output_error(name, gain):
    generator = torch.Generator().manual_seed(3)
    mixing = torch.randn(64, 64, generator=generator) * torch.logspace(0, -2, 64)
    x = torch.randn(4096, 64, generator=generator) @ mixing
    errors = [
        quantize(name, random((48, 64)), rounding, hessian=x.t() @ x / len(x)).output_error
        for rounding in ("nearest", "calibrated")
    ]
    assert errors[1] < gain * errors[0]


# ------------------------------------------------------------------------------------------- comfy-kitchen


@pytest.fixture
def eager():
    """comfy-kitchen's W4A8 module in plain torch."""
    return pytest.importorskip("comfy_kitchen.backends.eager.w4a8_int8")


def options_of(eager, name: str) -> dict[str, object]:
    """How its quantizer is called for round to nearest; skips where the installed comfy-kitchen has no 6 bits."""
    if name == "w4a8":
        return {}
    if "bits" not in inspect.signature(eager.quantize_w4a8_int8_weight).parameters:
        pytest.skip("this comfy-kitchen has no 6 bits")
    return {"bits": 6, "scale_search": False}


def quantize_in_kitchen(eager, name: str, rotated: torch.Tensor) -> dict[str, torch.Tensor]:
    """What comfy-kitchen makes of a rotated weight, whose rotation differs from this project's in the last bit."""
    packed, relative, channel, correction, codebook = eager._quantize_w4a8_chunked(
        rotated, lambda rows, _: rows, 16, 16, True, torch.float8_e4m3fn, True, **options_of(eager, name)
    )
    assert correction is None
    tensors = {"weight": packed, "weight_s_rel": relative, "weight_s_channel": channel}
    return tensors if codebook is None else tensors | {"weight_codebook": codebook}


def dequantize_in_kitchen(eager, parts) -> torch.Tensor:
    """The weight in the rotated basis, float32."""
    codebook, channel = parts.get("weight_codebook"), parts["weight_s_channel"]
    int8 = eager._dequant_int4_grouped_to_int8(parts["weight"], parts["weight_s_rel"], codebook, 16)
    return eager._dequantize_w4a8_int8_weight_from_int8(int8, channel, None, 16, torch.float32)


@pytest.mark.parametrize(
    "make, shape",
    [*((make, shape) for make in WEIGHTS for shape in SHAPES), (heavy_tails, (2100, 2048))],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
@pytest.mark.parametrize("name", LEVELS)
def test_nearest_equals_comfy_kitchen(eager, name, make, shape):
    """Of equal levels a file has the lowest index here, and either there; rows of the last shape do not fit its chunks."""
    made = quantize(name, make(shape))
    ours, theirs = parts_of(made), quantize_in_kitchen(eager, name, made.codec.rotation.apply(make(shape)))
    assert ours.keys() - {"comfy_quant"} == theirs.keys()
    for key in theirs.keys() - {"weight"}:
        assert torch.equal(raw(ours[key]), raw(theirs[key])), key
    assert torch.equal(dequantize_in_kitchen(eager, theirs), stored_values(made))
    distinct = (levels_of(made).diff(dim=-1) > 0).all(-1).repeat_interleave(16, dim=1)
    indices = [unpack_indices(parts["weight"], made) for parts in (ours, theirs)]
    assert distinct.any() and torch.equal(indices[0][distinct], indices[1][distinct])


def unpack_indices(packed: torch.Tensor, made: QuantizedWeight) -> torch.Tensor:
    """The indices of levels less a constant: the weight of unit scales without a codebook or rotation."""
    rows, columns = made.shape
    parts = {"weight": packed, "weight_s_rel": torch.ones(rows, columns // 16), "weight_s_channel": torch.ones(rows)}
    return replace(made.codec, rotation=None).dequantize(parts, made.shape)


@pytest.mark.parametrize("rounding", ROUNDINGS)
@made_by
@pytest.mark.parametrize("name", LEVELS)
def test_comfy_kitchen_dequantizes_to_the_same_values(eager, name, make, rounding):
    options_of(eager, name)
    made = quantize(name, make((48, 320)), rounding)
    assert torch.equal(dequantize_in_kitchen(eager, parts_of(made)), stored_values(made))


def test_fitted_codes_ascend_where_comfy_kitchens_do_not(eager):
    """Its codes that start from equal quantiles, as those of many zeros, cross, and are searched as if they ascended."""
    weight = random((64, 256)) ** 5 * 1e3
    weight[::2] = 0
    made = quantize("w4a8", weight)
    rotated = made.codec.rotation.apply(weight)
    theirs = quantize_in_kitchen(eager, "w4a8", rotated)
    assert torch.equal(made.solution.levels.codes, theirs["weight_codebook"].sort().values)
    assert not torch.equal(made.solution.levels.codes, theirs["weight_codebook"])
    errors = [(values - rotated).norm() for values in (stored_values(made), dequantize_in_kitchen(eager, theirs))]
    assert errors[0] < errors[1]


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-3), (torch.bfloat16, 2e-2)], ids=str)
@pytest.mark.parametrize("name", LEVELS)
def test_outputs_equal_those_of_comfy_kitchen(eager, name, dtype, tolerance):
    """Within rounding: comfy-kitchen rotates activations in their dtype, which moves some of them to the next INT8."""
    options_of(eager, name)
    made, x, bias = quantize(name, random((96, 512))), random((40, 512), 5).to(dtype), random((96,), 6)
    parts, rotation = parts_of(made), made.codec.rotation
    expected = eager.w4a8_int8_linear(
        x,
        *(parts[key] for key in ("weight", "weight_s_rel", "weight_s_channel")),
        parts.get("weight_codebook"),
        bias=bias,
        convrot_groupsize=rotation.size,
        out_dtype=torch.float32,
    )
    output = torch.nn.functional.linear(made.codec.quantize_activations(x), made.dequantize(), bias)
    assert (output - expected).norm() < tolerance * expected.norm()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@made_by
def test_nearest_of_convrot_w4a4_equals_comfy_kitchen(make, shape):
    """Rows of zeros have another scale there, and zeros as well."""
    kitchen = pytest.importorskip("comfy_kitchen.backends.eager.convrot_w4a4")
    made = quantize("w4a4-int8", make(shape))
    packed, scale = kitchen.quantize_signed_int4_rowwise(made.codec.rotation.apply(make(shape)))
    parts, filled = parts_of(made), made.qdata.any(1)
    assert torch.equal(parts["weight"], packed)
    assert filled.any() and torch.equal(parts["weight_scale"][filled], scale[filled])
    values = kitchen._unpack_int4_row_major(packed).float() * scale.reshape(-1, 1)
    assert torch.equal(values, stored_values(made))


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-2), (torch.bfloat16, 6e-2)], ids=str)
@pytest.mark.parametrize("name", ("w4a4-int8", "w4a4-int4"))
def test_outputs_of_convrot_w4a4_equal_those_of_comfy_kitchen(name, dtype, tolerance):
    """Its function in plain torch computes INT4 for either dtype; INT8 is what its CUDA function calls, in plain torch."""
    kitchen = pytest.importorskip("comfy_kitchen.backends.eager.convrot_w4a4")
    int8_linear = pytest.importorskip("comfy_kitchen.backends.eager.quantization").int8_linear
    made, x, bias = quantize(name, random((96, 512))), random((40, 512), 5).to(dtype), random((96,), 6)
    parts, size = parts_of(made), made.codec.rotation.size
    weight, scale = parts["weight"], parts["weight_scale"]
    if name == "w4a4-int4":
        expected = kitchen.convrot_w4a4_linear(x, weight, scale, bias.to(dtype), size).float()
    else:
        int8 = kitchen.prepare_int4_weight_for_int8_linear(weight)
        expected = int8_linear(x, int8, scale, bias, torch.float32, convrot=True, convrot_groupsize=size)
    output = torch.nn.functional.linear(made.codec.quantize_activations(x, (8, 6)), made.dequantize(), bias)
    assert (output - expected).norm() < tolerance * expected.norm()
