"""8-bit linear layers against float64, in Triton and in plain torch."""

from types import SimpleNamespace

import pytest
import torch

from learned_rounding import kernels
from learned_rounding.kernels import devices, reference
from learned_rounding.kernels.hadamard import rotate

INT8, FP8 = torch.int8, torch.float8_e4m3fn
DTYPES = pytest.mark.parametrize("dtype", [INT8, FP8], ids=["int8", "fp8"])


def random(*shape, seed=0, device="cpu", dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


@pytest.fixture(scope="module")
def linear(device):
    from learned_rounding.kernels.triton import linear

    return linear


def multiply(linear, activations, input_scale, qdata, scale, bias, block_size, out_dtype, launch):
    """Product by the Triton kernel; ``input_scale`` (M, groups) or None."""
    by_block = None if input_scale is None else input_scale.t()
    x = activations if input_scale is None else as_bits(activations)
    operands = linear.Operands(x, by_block, as_bits(qdata), scale, bias)
    return linear.prepare_product(operands, block_size, out_dtype, launch)(operands)


def as_bits(qdata):
    return qdata if qdata.dtype is INT8 else qdata.view(torch.uint8)


def exact(activations, input_scale, qdata, scale, bias, block_size):
    """What qdata mean, multiplied in float64."""

    def dequantize(qdata, scale, rows):
        if block_size:
            scale = scale.repeat_interleave(rows, 0)[: qdata.shape[0]].repeat_interleave(block_size, 1)[
                :, : qdata.shape[1]
            ]
        return qdata.double() * scale.double()

    out = dequantize(activations, input_scale, 1) @ dequantize(qdata, scale, block_size).t()
    return out if bias is None else out + bias.double()


SHAPES = pytest.mark.parametrize("rows, columns, inner", [(1, 50, 200), (37, 70, 192), (16, 33, 72)])


@DTYPES
@pytest.mark.parametrize("block_size", [0, 32, 64, 128])
@SHAPES
@pytest.mark.parametrize("tma", [False, True], ids=["pointers", "descriptors"])
def test_products_match_float64(linear, device, dtype, block_size, rows, columns, inner, tma):
    if tma and (linear.TensorDescriptor is None or inner % 16):
        pytest.skip("descriptors need rows that are multiples of 16 bytes")
    qdata, scale = reference.quantize_weight(random(columns, inner, seed=1, device=device), dtype, block_size)
    activations, input_scale = reference.quantize_inputs(random(rows, inner, device=device), dtype, block_size, 0)
    want = exact(activations, input_scale, qdata, scale, None, block_size)
    for launch in (linear.Launch(16, 32, 64, 4, 1, tma), linear.Launch(16, 64, 32, 4, 1, tma)):
        got = multiply(linear, activations, input_scale, qdata, scale, None, block_size, torch.float32, launch)
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5 * want.abs().max().item())


@pytest.mark.parametrize("block_size", [0, 64])
def test_dequantized_weights_multiply_unquantized_activations(linear, device, block_size):
    """Path of GPUs without FP8 tensor cores."""
    weight, x = random(40, 192, seed=1, device=device), random(20, 192, device=device).half()
    qdata, scale = reference.quantize_weight(weight, FP8, block_size)
    bias = random(40, seed=2, device=device)
    got = multiply(linear, x, None, qdata, scale, bias, block_size, torch.float32, linear.Launch(16, 32, 64, 4, 1))
    want = x.double() @ reference.dequantize_weight(qdata, scale, block_size, 0, torch.float64).t() + bias.double()
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-4 * want.abs().max().item())


@pytest.mark.parametrize("block_size, rotate_by", [(0, 0), (0, 64), (64, 0)], ids=["row", "rotated", "block"])
@pytest.mark.parametrize("implementation", ["triton", "reference"])
def test_layers_on_gpus_without_fp8_do_not_quantize_activations(
    monkeypatch, linear, device, implementation, block_size, rotate_by
):
    monkeypatch.setattr(devices, "has_fp8_matmul", lambda device: False)
    if device.type == "cpu":
        monkeypatch.setattr(
            torch.cuda, "get_device_properties", lambda device: SimpleNamespace(multi_processor_count=82)
        )
    weight, x = random(48, 256, seed=1, device=device), random(9, 256, device=device).half()
    qdata, scale = reference.quantize_weight(rotate(weight, rotate_by) if rotate_by else weight, FP8, block_size)
    entry = {"triton": linear, "reference": reference}[implementation]
    arguments = x, qdata, scale, None
    got = entry.prepare_linear(*arguments, block_size, rotate_by, torch.float32)(*arguments)
    want = x.double() @ reference.dequantize_weight(qdata, scale, block_size, rotate_by, torch.float32).double().t()
    assert (got - want).norm() / want.norm() < 2e-3  # error of float16; quantized activations give 0.026


def test_scale_per_tensor_and_bias_of_another_dtype(linear, device):
    qdata, _ = reference.quantize_weight(random(40, 64, seed=1, device=device), INT8, 0)
    activations, input_scale = reference.quantize_inputs(random(20, 64, device=device), INT8, 0, 0)
    scale, bias = torch.full((1, 1), 0.01, device=device), random(40, seed=2, device=device).bfloat16()
    got = multiply(
        linear, activations, input_scale, qdata, scale, bias, 0, torch.bfloat16, linear.Launch(16, 32, 64, 4, 1)
    )
    want = exact(activations, input_scale, qdata, scale, bias, 0)
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
def test_public_layers_match_float64(device, name, dtype):
    quantize, block_size = LINEARS[name]
    blocks = {"block_size": block_size} if block_size else {}
    weight, bias = random(48, 160, seed=1, device=device), random(48, seed=2, device=device, dtype=dtype)
    x = random(2, 20, 160, device=device, dtype=dtype)
    qdata, scale = getattr(kernels, quantize)(weight, *blocks.values())
    want = torch.nn.functional.linear(x.double(), weight.double(), bias.double())
    got = getattr(kernels, name)(x, qdata, scale, bias, **blocks)
    assert got.shape == (2, 20, 48) and got.dtype is dtype
    assert (got - want).norm() / want.norm() < (0.02 if "int8" in name else 0.06)
    wide = getattr(kernels, name)(x, qdata, scale, bias, **blocks, out_dtype=torch.float32)
    assert wide.dtype is torch.float32
    torch.testing.assert_close(wide.to(dtype), got, rtol=1e-2, atol=1e-2)
    assert getattr(kernels, name)(x[:0], qdata, scale, bias, **blocks).shape == (0, 20, 48)


def test_rotated_layers_undo_the_rotation(device):
    weight, x = random(48, 256, seed=1, device=device), random(9, 256, device=device)
    qdata, scale = kernels.quantize_int8_row_weight(rotate(weight, 64))
    got, want = kernels.int8_row_linear(x, qdata, scale, rotate_by=64), x @ weight.t()
    assert (got - want).norm() / want.norm() < 0.02
    torch.testing.assert_close(kernels.dequantize_weight(qdata, scale, rotate_by=64), weight, rtol=0, atol=0.05)
