"""Quantizers and linear layers of 8-bit codes: Triton against plain torch, and both against float64."""

from types import SimpleNamespace

import pytest
import torch

from learned_rounding import kernels
from learned_rounding.kernels import cards, reference
from learned_rounding.kernels.hadamard import rotate
from learned_rounding.quant_core.formats import make_encoding

INT8, FP8 = torch.int8, torch.float8_e4m3fn
DTYPES = pytest.mark.parametrize("dtype", [INT8, FP8], ids=["int8", "fp8"])
BLOCKS = pytest.mark.parametrize("block_size", [0, 16, 64], ids=["row", "block 16", "block 64"])
FORMATS = {(INT8, False): "int8_tensorwise", (FP8, False): "float8_e4m3fn_rowwise"}
FORMATS |= {(INT8, True): "int8_blockwise", (FP8, True): "float8_e4m3fn_blockwise"}


def random(*shape, seed=0, device="cpu", dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def bits(codes):
    return codes.view(torch.uint8)


@pytest.fixture(scope="module")
def quantize(device):
    from learned_rounding.kernels.triton import quantize

    return quantize


@pytest.fixture(scope="module")
def linear(device):
    from learned_rounding.kernels.triton import linear

    return linear


def awkward(device, dtype=torch.float32):
    """Inputs with an odd tail, zeros, a block of zeros, huge and tiny values, and ties."""
    x = random(37, 200, device=device) * torch.logspace(-3, 3, 37, device=device)[:, None]
    x[3], x[5, :64] = 0, 0
    if dtype is torch.float32:
        x[9], x[10] = x[9] * 1e33, x[10] * 1e-36
    x[11] = torch.arange(200, device=device).float() - 100
    x[12] = torch.arange(200, device=device) / 2 - 27
    x[12, 0::16] = 127
    return x.to(dtype)


@DTYPES
@BLOCKS
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_quantizers_are_those_of_plain_torch_to_the_bit(quantize, device, dtype, block_size, x_dtype):
    x = awkward(device, x_dtype)
    for mine, plain in (
        (quantize.quantize_inputs(x, dtype, block_size, 0), reference.quantize_inputs(x, dtype, block_size, 0)),
        (quantize.quantize_weight(x, dtype, block_size), reference.quantize_weight(x, dtype, block_size)),
    ):
        assert torch.equal(bits(mine[0]), bits(plain[0])) and torch.equal(mine[1], plain[1])
        assert mine[1].shape == plain[1].shape and mine[1].isfinite().all() and (mine[1] > 0).all()


@DTYPES
@BLOCKS
def test_quantized_inputs_are_what_the_formats_promise(dtype, block_size):
    x = awkward("cpu")[:9]
    codes, scale = reference.quantize_inputs(x, dtype, block_size, 0)
    encoding = make_encoding(FORMATS[dtype, block_size > 0], block_size=block_size or None)
    wide = scale.repeat_interleave(block_size, 1)[:, :200] if block_size else scale
    torch.testing.assert_close(codes.float() * wide, encoding.quantize_inputs(x), rtol=1e-6, atol=0)


@DTYPES
@BLOCKS
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_group_with_nan_or_inf_stays_so_and_the_others_do_not(quantize, device, dtype, block_size, bad):
    x = random(4, 128, device=device)
    x[1, 70] = bad
    for entry in (quantize, reference):
        codes, scale = entry.quantize_inputs(x, dtype, block_size, 0)
        meant = scale.repeat_interleave(block_size, 1) if block_size else scale
        broken = ~meant.isfinite().expand(4, 128)
        assert broken[1, 70] and not broken[[0, 2, 3]].any()
        assert broken.sum() == (block_size or 128)


@DTYPES
@pytest.mark.parametrize("group", [16, 64, 256])
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("columns", [256, 1792, 36864])
def test_rotated_inputs(quantize, device, dtype, group, x_dtype, columns):
    x = random(5, columns, seed=1, device=device).to(x_dtype) * 1e3
    mine, plain = quantize.quantize_inputs(x, dtype, 0, group), reference.quantize_inputs(x, dtype, 0, group)
    torch.testing.assert_close(mine[1], plain[1], rtol=4e-5, atol=0)  # float32 counts as two bfloat16, twice
    assert (bits(mine[0]) != bits(plain[0])).float().mean() < 0.01  # sums of 16 bits: a tie may fall the other way
    apart = (mine[0].float() - plain[0].float()).abs() / plain[0].float().abs().clamp_min(1)
    assert apart.max() <= (1 if dtype is INT8 else 0.126)  # to a neighbouring code


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rotated_tokens_with_nan_or_inf_stay_so_and_the_others_do_not(quantize, device, x_dtype):
    x = random(4, 512, device=device).to(x_dtype)
    x[1, 70], x[2, 300] = float("nan"), -float("inf")
    for entry in (quantize, reference):
        _, scale = entry.quantize_inputs(x, INT8, 0, 256)
        assert scale.isfinite().flatten().tolist() == [True, False, False, True]


@pytest.mark.parametrize("columns", [24, 20000, 40000])
def test_rows_of_any_length(quantize, device, columns):
    x = random(3, columns, device=device)
    mine, plain = quantize.quantize_inputs(x, INT8, 0, 0), reference.quantize_inputs(x, INT8, 0, 0)
    assert torch.equal(mine[0], plain[0]) and torch.equal(mine[1], plain[1])


def test_strided_inputs(quantize, device):
    x = random(64, 40, device=device)
    for view in (x[:, ::2], x.t(), x[::2]):
        mine, plain = quantize.quantize_inputs(view, INT8, 16, 0), reference.quantize_inputs(view, INT8, 16, 0)
        assert torch.equal(mine[0], plain[0]) and torch.equal(mine[1], plain[1])


@DTYPES
@BLOCKS
@pytest.mark.parametrize("out", [torch.float32, torch.bfloat16])
def test_dequantized_weights(quantize, device, dtype, block_size, out):
    codes, scale = reference.quantize_weight(random(50, 136, device=device), dtype, block_size)
    mine = quantize.dequantize_weight(codes, scale, block_size, 0, out)
    # Triton's interpreter does not round to bfloat16 as a card does.
    slack = 2**-7 if out is torch.bfloat16 and device.type == "cpu" else 0
    torch.testing.assert_close(mine, reference.dequantize_weight(codes, scale, block_size, 0, out), rtol=slack, atol=0)


@pytest.mark.parametrize("scale_of", ["row", "tensor"])
def test_dequantized_and_rotated_back(quantize, device, scale_of):
    codes, scale = reference.quantize_weight(random(5, 512, device=device), INT8, 0)
    scale = scale if scale_of == "row" else scale.max().reshape(1, 1)
    mine = quantize.dequantize_weight(codes, scale, 0, 256, torch.float32)
    torch.testing.assert_close(
        mine, reference.dequantize_weight(codes, scale, 0, 256, torch.float32), rtol=1e-5, atol=1e-6
    )


def test_every_fp8_code_is_decoded_and_encoded(quantize, device):
    values = torch.arange(256, dtype=torch.uint8, device=device).view(FP8)
    values = values[values.float().isfinite()].reshape(1, -1)
    one = torch.ones(1, 1, device=device)
    assert torch.equal(quantize.dequantize_weight(values, one, 0, 0, torch.float32), values.float())
    codes, scale = quantize.quantize_inputs(values.float(), FP8, 0, 0)
    assert torch.equal(codes.float(), values.float()) and scale == 1


def exact(inputs, input_scale, codes, scale, bias, block_size):
    """What codes mean, multiplied in float64."""

    def meaning(codes, scale, rows):
        if block_size:
            scale = scale.repeat_interleave(rows, 0)[: codes.shape[0]].repeat_interleave(block_size, 1)[
                :, : codes.shape[1]
            ]
        return codes.double() * scale.double()

    out = meaning(inputs, input_scale, 1) @ meaning(codes, scale, block_size).t()
    return out if bias is None else out + bias.double()


SHAPES = pytest.mark.parametrize("rows, columns, inner", [(1, 50, 200), (37, 70, 192), (16, 33, 72)])


@DTYPES
@pytest.mark.parametrize("block_size", [0, 32, 64, 128])
@SHAPES
@pytest.mark.parametrize("tma", [False, True], ids=["pointers", "descriptors"])
def test_products_are_those_of_float64(linear, device, dtype, block_size, rows, columns, inner, tma):
    if tma and (linear.TensorDescriptor is None or inner % 16):
        pytest.skip("rows of a descriptor are multiples of 16 bytes")
    codes, scale = reference.quantize_weight(random(columns, inner, seed=1, device=device), dtype, block_size)
    inputs, input_scale = reference.quantize_inputs(random(rows, inner, device=device), dtype, block_size, 0)
    want = exact(inputs, input_scale, codes, scale, None, block_size)
    for launch in (linear.Launch(16, 32, 64, 4, 1, tma), linear.Launch(16, 64, 32, 4, 1, tma)):
        got = linear.multiply(inputs, input_scale, codes, scale, None, block_size, torch.float32, launch)
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5 * want.abs().max().item())


@pytest.mark.parametrize("block_size", [0, 64])
def test_decoded_weights_meet_plain_inputs(linear, device, block_size):
    """What cards without FP8 arithmetic do."""
    weight, x = random(40, 192, seed=1, device=device), random(20, 192, device=device).half()
    codes, scale = reference.quantize_weight(weight, FP8, block_size)
    bias = random(40, seed=2, device=device)
    got = linear.multiply(x, None, codes, scale, bias, block_size, torch.float32, linear.Launch(16, 32, 64, 4, 1))
    want = x.double() @ reference.dequantize_weight(codes, scale, block_size, 0, torch.float64).t() + bias.double()
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-4 * want.abs().max().item())


@pytest.mark.parametrize("block_size, rotate_by", [(0, 0), (0, 64), (64, 0)], ids=["row", "rotated", "block"])
@pytest.mark.parametrize("implementation", ["triton", "reference"])
def test_layers_on_cards_without_fp8_leave_the_inputs_as_they_are(
    monkeypatch, linear, device, implementation, block_size, rotate_by
):
    monkeypatch.setattr(cards, "multiplies_fp8", lambda device: False)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(multi_processor_count=82))
    weight, x = random(48, 256, seed=1, device=device), random(9, 256, device=device).half()
    codes, scale = reference.quantize_weight(rotate(weight, rotate_by) if rotate_by else weight, FP8, block_size)
    entry = {"triton": linear, "reference": reference}[implementation]
    got = entry.scaled_linear(x, codes, scale, None, block_size, rotate_by, torch.float32)
    want = x.double() @ reference.dequantize_weight(codes, scale, block_size, rotate_by, torch.float32).double().t()
    assert (got - want).norm() / want.norm() < 2e-3  # of half precision; quantized inputs have 0.026


def test_a_scale_for_all_and_a_bias_of_another_dtype(linear, device):
    codes, _ = reference.quantize_weight(random(40, 64, seed=1, device=device), INT8, 0)
    inputs, input_scale = reference.quantize_inputs(random(20, 64, device=device), INT8, 0, 0)
    scale, bias = torch.full((1, 1), 0.01, device=device), random(40, seed=2, device=device).bfloat16()
    got = linear.multiply(inputs, input_scale, codes, scale, bias, 0, torch.bfloat16, linear.Launch(16, 32, 64, 4, 1))
    want = exact(inputs, input_scale, codes, scale, bias, 0)
    assert got.dtype is torch.bfloat16
    torch.testing.assert_close(got.double(), want, rtol=1e-2, atol=1e-2)


LINEARS = {
    "int8_block_linear": ("quantize_int8_block_weight", 64),
    "fp8_block_linear": ("quantize_fp8_block_weight", 64),
    "int8_row_linear": ("quantize_int8_row_weight", 0),
    "fp8_row_linear": ("quantize_fp8_row_weight", 0),
}


@pytest.mark.parametrize("name", LINEARS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_public_layers(device, name, dtype):
    quantize, block_size = LINEARS[name]
    blocks = {"block_size": block_size} if block_size else {}
    weight, bias = random(48, 160, seed=1, device=device), random(48, seed=2, device=device, dtype=dtype)
    x = random(2, 20, 160, device=device, dtype=dtype)
    codes, scale = getattr(kernels, quantize)(weight, *blocks.values())
    want = torch.nn.functional.linear(x.double(), weight.double(), bias.double())
    got = getattr(kernels, name)(x, codes, scale, bias, **blocks)
    assert got.shape == (2, 20, 48) and got.dtype is dtype
    assert (got - want).norm() / want.norm() < (0.02 if "int8" in name else 0.06)
    wide = getattr(kernels, name)(x, codes, scale, bias, **blocks, out_dtype=torch.float32)
    assert wide.dtype is torch.float32
    torch.testing.assert_close(wide.to(dtype), got, rtol=1e-2, atol=1e-2)
    assert getattr(kernels, name)(x[:0], codes, scale, bias, **blocks).shape == (0, 20, 48)


def test_rotated_layers_undo_the_rotation(device):
    weight, x = random(48, 256, seed=1, device=device), random(9, 256, device=device)
    codes, scale = kernels.quantize_int8_row_weight(rotate(weight, 64))
    got, want = kernels.int8_row_linear(x, codes, scale, rotate_by=64), x @ weight.t()
    assert (got - want).norm() / want.norm() < 0.02
    torch.testing.assert_close(kernels.dequantize_weight(codes, scale, rotate_by=64), weight, rtol=0, atol=0.05)


@pytest.mark.parametrize(
    "call",
    [
        lambda x, codes, scale: kernels.int8_block_linear(x[:, :64], codes, scale, block_size=32),
        lambda x, codes, scale: kernels.int8_block_linear(x, codes, scale),
        lambda x, codes, scale: kernels.fp8_block_linear(x, codes, scale, block_size=32),
        lambda x, codes, scale: kernels.int8_block_linear(x, codes, scale, torch.ones(3), block_size=32),
        lambda x, codes, scale: kernels.int8_row_linear(x, codes, scale, rotate_by=256),
        lambda x, codes, scale: kernels.int8_row_linear(x, codes, scale, rotate_by=5),
        lambda x, codes, scale: kernels.scaled_linear(x, codes, scale, block_size=32, rotate_by=16),
        lambda x, codes, scale: kernels.dequantize_weight(codes, scale, block_size=32, rotate_by=16),
        lambda x, codes, scale: kernels.quantize_int8_block(x, 0),
        lambda x, codes, scale: kernels.backend("fast"),
    ],
)
def test_bad_arguments_are_refused_with_a_sentence(call, sentences):
    x = torch.ones(2, 96)
    with sentences.raises(ValueError):
        call(x, *kernels.quantize_int8_block_weight(torch.ones(8, 96), 32))
