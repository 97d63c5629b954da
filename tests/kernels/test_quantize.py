"""8-bit quantizers: Triton against plain torch, and plain torch against the formats."""

from itertools import product

import pytest
import torch

from learned_rounding.kernels import reference
from learned_rounding.quant_core.formats import make_codec

INT8, FP8 = torch.int8, torch.float8_e4m3fn
X_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Every dtype with every block size (0: one scale per row), and the dtypes of activations in turn.
CASES = [
    (dtype, block_size, X_DTYPES[index % 3])
    for index, (dtype, block_size) in enumerate(product((INT8, FP8), (0, 16, 64)))
]
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
    """A partial last block, zeros, a block of zeros, huge and tiny values, ties."""
    x = random(17, 200, device=device) * torch.logspace(-3, 3, 17, device=device)[:, None]
    x[3], x[5, :64] = 0, 0
    if dtype is torch.float32:
        x[9], x[10] = x[9] * 1e33, x[10] * 1e-36
    x[11] = torch.arange(200, device=device).float() - 100
    x[12] = torch.arange(200, device=device) / 2 - 27
    x[12, 0::16] = 127
    return x.to(dtype)


def assert_identical(fast, plain):
    assert torch.equal(bits(fast[0]), bits(plain[0]))
    assert torch.equal(fast[1], plain[1])
    assert fast[1].shape == plain[1].shape
    assert fast[1].isfinite().all()
    assert (fast[1] > 0).all()


def test_quantized_activations_are_bit_identical_to_plain_torch(subtests, quantize, device):
    for dtype, block_size, x_dtype in CASES:
        x = edge_cases(device, x_dtype)
        with subtests.test(dtype=dtype, block_size=block_size, x_dtype=x_dtype):
            assert_identical(
                quantize_inputs(quantize, x, dtype, block_size, 0), reference.quantize_inputs(x, dtype, block_size, 0)
            )


def test_quantized_weights_are_bit_identical_to_plain_torch(subtests, quantize, device):
    for dtype, block_size, x_dtype in CASES:
        x = edge_cases(device, x_dtype)
        with subtests.test(dtype=dtype, block_size=block_size, x_dtype=x_dtype):
            assert_identical(
                quantize.quantize_weight(x, dtype, block_size), reference.quantize_weight(x, dtype, block_size)
            )


def test_quantized_activations_match_the_definition_of_the_format(subtests):
    x = edge_cases("cpu")[:9]
    for dtype, block_size, _ in CASES:
        qdata, scale = reference.quantize_inputs(x, dtype, block_size, 0)
        codec = make_codec(FORMATS[dtype, block_size > 0], block_size=block_size or None)
        wide = scale.repeat_interleave(block_size, 1)[:, :200] if block_size else scale
        with subtests.test(dtype=dtype, block_size=block_size):
            torch.testing.assert_close(qdata.float() * wide, codec.quantize_activations(x), rtol=1e-6, atol=0)


def test_nan_or_inf_stays_within_its_scale_group(subtests, quantize, device):
    bad = (float("nan"), float("inf"), -float("inf"))
    for index, (dtype, block_size, _) in enumerate(CASES):
        x = random(4, 128, device=device)
        x[1, 70] = bad[index % 3]
        for name, entry in (("triton", quantize), ("reference", reference)):
            _, scale = quantize_inputs(entry, x, dtype, block_size, 0)
            spread = scale.repeat_interleave(block_size, 1) if block_size else scale
            broken = ~spread.isfinite().expand(4, 128)
            with subtests.test(name, dtype=dtype, block_size=block_size, bad=bad[index % 3]):
                assert broken[1, 70]
                assert not broken[[0, 2, 3]].any()
                assert broken.sum() == (block_size or 128)


ROTATED = [  # dtype, group, dtype of the activations, rows, columns; from 16,385 columns on a row is loaded in parts
    (INT8, 16, torch.float32, 3, 256),
    (INT8, 64, torch.bfloat16, 3, 1792),
    (INT8, 256, torch.float16, 3, 256),
    (FP8, 16, torch.float16, 3, 1792),
    (FP8, 64, torch.float32, 3, 256),
    (FP8, 256, torch.bfloat16, 3, 1792),
    (FP8, 256, torch.float32, 1, 18432),
    (INT8, 64, torch.float16, 1, 18432),
]


@pytest.mark.parametrize("dtype, group, x_dtype, rows, columns", ROTATED)
def test_rotated_activations_match_plain_torch(quantize, device, dtype, group, x_dtype, rows, columns):
    x = random(rows, columns, seed=1, device=device).to(x_dtype) * 1e3
    fast, plain = quantize_inputs(quantize, x, dtype, 0, group), reference.quantize_inputs(x, dtype, 0, group)
    torch.testing.assert_close(fast[1], plain[1], rtol=4e-5, atol=0)  # two products of split bfloat16
    # Products of 16-bit floats: a tie may round the other way, by one quantization step at most.
    assert (bits(fast[0]) != bits(plain[0])).float().mean() < 0.01
    apart = (fast[0].float() - plain[0].float()).abs() / plain[0].float().abs().clamp_min(1)
    assert apart.max() <= (1 if dtype is INT8 else 0.126)


def test_nan_or_inf_stays_within_its_rotated_token(subtests, quantize, device):
    for x_dtype in X_DTYPES:
        x = random(4, 512, device=device).to(x_dtype)
        x[1, 70], x[2, 300] = float("nan"), -float("inf")
        for name, entry in (("triton", quantize), ("reference", reference)):
            _, scale = quantize_inputs(entry, x, INT8, 0, 256)
            with subtests.test(name, x_dtype=x_dtype):
                assert scale.isfinite().flatten().tolist() == [True, False, False, True]


def test_rows_of_any_length_match_plain_torch(subtests, quantize, device):
    for columns in (24, 20000, 40000):
        x = random(2, columns, device=device)
        fast, plain = quantize_inputs(quantize, x, INT8, 0, 0), reference.quantize_inputs(x, INT8, 0, 0)
        with subtests.test(columns=columns):
            assert torch.equal(fast[0], plain[0])
            assert torch.equal(fast[1], plain[1])


def test_strided_activations_match_plain_torch(subtests, quantize, device):
    x = random(20, 40, device=device)
    for name, view in {"columns": x[:, ::2], "transposed": x.t(), "rows": x[::2]}.items():
        fast, plain = quantize_inputs(quantize, view, INT8, 16, 0), reference.quantize_inputs(view, INT8, 16, 0)
        with subtests.test(name):
            assert torch.equal(fast[0], plain[0])
            assert torch.equal(fast[1], plain[1])


def test_dequantized_weights_match_plain_torch(subtests, quantize, device):
    for index, (dtype, block_size, _) in enumerate(CASES):
        out = (torch.float32, torch.bfloat16)[index % 2]
        qdata, scale = reference.quantize_weight(random(50, 136, device=device), dtype, block_size)
        fast = quantize.dequantize_weight(qdata, scale, block_size, 0, out)
        # Triton's interpreter rounds to bfloat16 differently from a GPU.
        slack = 2**-7 if out is torch.bfloat16 and device.type == "cpu" else 0
        with subtests.test(dtype=dtype, block_size=block_size, out=out):
            plain = reference.dequantize_weight(qdata, scale, block_size, 0, out)
            torch.testing.assert_close(fast, plain, rtol=slack, atol=0)


@pytest.mark.parametrize("scale_of", ["row", "tensor"])
def test_dequantization_undoes_the_rotation(quantize, device, scale_of):
    qdata, scale = reference.quantize_weight(random(3, 512, device=device), INT8, 0)
    scale = scale if scale_of == "row" else scale.max().reshape(1, 1)
    fast = quantize.dequantize_weight(qdata, scale, 0, 256, torch.float32)
    plain = reference.dequantize_weight(qdata, scale, 0, 256, torch.float32)
    torch.testing.assert_close(fast, plain, rtol=1e-5, atol=1e-6)


@pytest.fixture
def fp8_values(device):
    """All finite values of FP8, as one row."""
    values = torch.arange(256, dtype=torch.uint8, device=device).view(FP8)
    return values[values.float().isfinite()].reshape(1, -1)


def test_every_fp8_value_is_dequantized_exactly(quantize, fp8_values):
    one = torch.ones(1, 1, device=fp8_values.device)
    assert torch.equal(quantize.dequantize_weight(fp8_values, one, 0, 0, torch.float32), fp8_values.float())


def test_every_fp8_value_is_quantized_exactly(quantize, fp8_values):
    qdata, scale = quantize_inputs(quantize, fp8_values.float(), FP8, 0, 0)
    assert torch.equal(qdata.float(), fp8_values.float())
    assert scale == 1


def test_given_scale_quantizes_and_clamps(subtests, quantize, device):
    for x_dtype in X_DTYPES[1:]:
        x = (random(5, 1000, device=device) * 300).to(x_dtype)
        x[1, 70], x[2, 3], x[3, 4] = float("nan"), 6e4, -float("inf")
        scale = torch.tensor(0.75, device=device)
        got = quantize.prepare_static_quantizer(x)(x, scale)
        want = (x.float() * (1.0 / scale)).clamp(-448, 448).to(FP8).float()
        with subtests.test(x_dtype=x_dtype):
            assert torch.equal(got.float().nan_to_num(1e9), want.nan_to_num(1e9))
