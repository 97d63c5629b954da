"""8-bit quantizers: Triton against plain torch, and plain torch against the formats."""

import pytest
import torch

from learned_rounding.kernels import reference
from learned_rounding.quant_core.formats import make_codec

INT8, FP8 = torch.int8, torch.float8_e4m3fn
DTYPES = pytest.mark.parametrize("dtype", [INT8, FP8], ids=["int8", "fp8"])
BLOCKS = pytest.mark.parametrize("block_size", [0, 16, 64], ids=["row", "block 16", "block 64"])
FORMATS = {(INT8, False): "int8_tensorwise", (FP8, False): "float8_e4m3fn_rowwise"}
FORMATS |= {(INT8, True): "int8_blockwise", (FP8, True): "float8_e4m3fn_blockwise"}


def random(*shape, seed=0, device="cpu", dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def bits(qdata):
    return qdata.view(torch.uint8)


def quantize_inputs(implementation, x, dtype, block_size, rotate_by):
    """Quantized activations (M, K) and scale (M, groups)."""
    qdata, scale = implementation.prepare_quantizer(x, dtype, block_size, rotate_by)(x)
    return qdata, scale.t()


@pytest.fixture(scope="module")
def quantize(device):
    from learned_rounding.kernels.triton import quantize

    return quantize


def edge_cases(device, dtype=torch.float32):
    """Edge cases: a partial last block, zeros, a block of zeros, huge and tiny values, ties."""
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
def test_quantizers_are_bit_identical_to_plain_torch(quantize, device, dtype, block_size, x_dtype):
    x = edge_cases(device, x_dtype)
    for fast, plain in (
        (quantize_inputs(quantize, x, dtype, block_size, 0), reference.quantize_inputs(x, dtype, block_size, 0)),
        (quantize.quantize_weight(x, dtype, block_size), reference.quantize_weight(x, dtype, block_size)),
    ):
        assert torch.equal(bits(fast[0]), bits(plain[0])) and torch.equal(fast[1], plain[1])
        assert fast[1].shape == plain[1].shape and fast[1].isfinite().all() and (fast[1] > 0).all()


@DTYPES
@BLOCKS
def test_quantized_activations_match_the_formats_definition(dtype, block_size):
    x = edge_cases("cpu")[:9]
    qdata, scale = reference.quantize_inputs(x, dtype, block_size, 0)
    codec = make_codec(FORMATS[dtype, block_size > 0], block_size=block_size or None)
    wide = scale.repeat_interleave(block_size, 1)[:, :200] if block_size else scale
    torch.testing.assert_close(qdata.float() * wide, codec.quantize_activations(x), rtol=1e-6, atol=0)


@DTYPES
@BLOCKS
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nan_or_inf_stays_within_its_scale_group(quantize, device, dtype, block_size, bad):
    x = random(4, 128, device=device)
    x[1, 70] = bad
    for entry in (quantize, reference):
        _qdata, scale = quantize_inputs(entry, x, dtype, block_size, 0)
        spread = scale.repeat_interleave(block_size, 1) if block_size else scale
        broken = ~spread.isfinite().expand(4, 128)
        assert broken[1, 70] and not broken[[0, 2, 3]].any()
        assert broken.sum() == (block_size or 128)


@DTYPES
@pytest.mark.parametrize("group", [16, 64, 256])
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("columns", [256, 1792, 36864])
def test_rotated_activations_match_plain_torch(quantize, device, dtype, group, x_dtype, columns):
    x = random(5, columns, seed=1, device=device).to(x_dtype) * 1e3
    fast, plain = quantize_inputs(quantize, x, dtype, 0, group), reference.quantize_inputs(x, dtype, 0, group)
    torch.testing.assert_close(fast[1], plain[1], rtol=4e-5, atol=0)  # two products of split bfloat16
    assert (
        bits(fast[0]) != bits(plain[0])
    ).float().mean() < 0.01  # products of 16-bit floats: a tie may round the other way
    apart = (fast[0].float() - plain[0].float()).abs() / plain[0].float().abs().clamp_min(1)
    assert apart.max() <= (1 if dtype is INT8 else 0.126)  # at most one quantization step


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_nan_or_inf_stays_within_its_rotated_token(quantize, device, x_dtype):
    x = random(4, 512, device=device).to(x_dtype)
    x[1, 70], x[2, 300] = float("nan"), -float("inf")
    for entry in (quantize, reference):
        _, scale = quantize_inputs(entry, x, INT8, 0, 256)
        assert scale.isfinite().flatten().tolist() == [True, False, False, True]


@pytest.mark.parametrize("columns", [24, 20000, 40000])
def test_rows_of_any_length_match_plain_torch(quantize, device, columns):
    x = random(3, columns, device=device)
    fast, plain = quantize_inputs(quantize, x, INT8, 0, 0), reference.quantize_inputs(x, INT8, 0, 0)
    assert torch.equal(fast[0], plain[0]) and torch.equal(fast[1], plain[1])


def test_strided_activations_match_plain_torch(quantize, device):
    x = random(64, 40, device=device)
    for view in (x[:, ::2], x.t(), x[::2]):
        fast, plain = quantize_inputs(quantize, view, INT8, 16, 0), reference.quantize_inputs(view, INT8, 16, 0)
        assert torch.equal(fast[0], plain[0]) and torch.equal(fast[1], plain[1])


@DTYPES
@BLOCKS
@pytest.mark.parametrize("out", [torch.float32, torch.bfloat16])
def test_dequantized_weights_match_plain_torch(quantize, device, dtype, block_size, out):
    qdata, scale = reference.quantize_weight(random(50, 136, device=device), dtype, block_size)
    fast = quantize.dequantize_weight(qdata, scale, block_size, 0, out)
    # Triton's interpreter rounds to bfloat16 differently from a GPU.
    slack = 2**-7 if out is torch.bfloat16 and device.type == "cpu" else 0
    torch.testing.assert_close(fast, reference.dequantize_weight(qdata, scale, block_size, 0, out), rtol=slack, atol=0)


@pytest.mark.parametrize("scale_of", ["row", "tensor"])
def test_dequantization_undoes_the_rotation(quantize, device, scale_of):
    qdata, scale = reference.quantize_weight(random(5, 512, device=device), INT8, 0)
    scale = scale if scale_of == "row" else scale.max().reshape(1, 1)
    fast = quantize.dequantize_weight(qdata, scale, 0, 256, torch.float32)
    torch.testing.assert_close(
        fast, reference.dequantize_weight(qdata, scale, 0, 256, torch.float32), rtol=1e-5, atol=1e-6
    )


def test_every_fp8_value_is_dequantized_and_quantized_exactly(quantize, device):
    values = torch.arange(256, dtype=torch.uint8, device=device).view(FP8)
    values = values[values.float().isfinite()].reshape(1, -1)
    one = torch.ones(1, 1, device=device)
    assert torch.equal(quantize.dequantize_weight(values, one, 0, 0, torch.float32), values.float())
    qdata, scale = quantize_inputs(quantize, values.float(), FP8, 0, 0)
    assert torch.equal(qdata.float(), values.float()) and scale == 1


@pytest.mark.parametrize("x_dtype", [torch.bfloat16, torch.float16])
def test_given_scale_quantizes_and_clamps(quantize, device, x_dtype):
    x = (random(5, 1000, device=device) * 300).to(x_dtype)
    x[1, 70], x[2, 3], x[3, 4] = float("nan"), 6e4, -float("inf")
    scale = torch.tensor(0.75, device=device)
    got = quantize.prepare_static_quantizer(x)(x, scale)
    scaled = x.float() * (1.0 / scale)
    want = scaled.clamp(-448, 448).to(FP8).float()
    assert torch.equal(got.float().nan_to_num(1e9), want.nan_to_num(1e9))
