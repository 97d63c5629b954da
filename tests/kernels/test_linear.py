"""8-bit linear layers against float64, in Triton and in plain torch."""

from itertools import product
from types import SimpleNamespace

import pytest
import torch

from learned_rounding import kernels
from learned_rounding.kernels import devices, reference
from learned_rounding.kernels.hadamard import rotate
from learned_rounding.tests.kernels.gpu_layers import LAYERS, make_layer, relative
from learned_rounding.tests.kernels.gpu_layers import random as on_gpu

INT8, FP8 = torch.int8, torch.float8_e4m3fn


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


SHAPES = [(1, 50, 200), (20, 40, 192), (16, 33, 72)]  # of the product, with tails along each side
LAUNCHES = [(16, 32, 64), (16, 64, 32)]


def test_products_match_float64(subtests, linear, device):
    """Each dtype with each block size, by pointers and by descriptors, in shapes and tiles in turn."""
    for index, (dtype, block_size) in enumerate(product((INT8, FP8), (0, 32, 64, 128))):
        for tma in (False, True):
            if tma and linear.TensorDescriptor is None:
                continue
            # Descriptors need rows that are multiples of 16 bytes.
            rows, columns, inner = SHAPES[1] if tma else SHAPES[index % 3]
            launch = linear.Launch(*LAUNCHES[(index + tma) % 2], 4, 1, tma)
            qdata, scale = reference.quantize_weight(random(columns, inner, seed=1, device=device), dtype, block_size)
            activations, input_scale = reference.quantize_inputs(
                random(rows, inner, device=device), dtype, block_size, 0
            )
            want = exact(activations, input_scale, qdata, scale, None, block_size)
            got = multiply(linear, activations, input_scale, qdata, scale, None, block_size, torch.float32, launch)
            with subtests.test(dtype=dtype, block_size=block_size, tma=tma, inner=inner):
                torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5 * want.abs().max().item())


def test_dequantized_weights_multiply_unquantized_activations(subtests, linear, device):
    """Path of GPUs without FP8 tensor cores."""
    weight, x = random(40, 192, seed=1, device=device), random(20, 192, device=device).half()
    bias = random(40, seed=2, device=device)
    for block_size in (0, 64):
        qdata, scale = reference.quantize_weight(weight, FP8, block_size)
        launch = linear.Launch(16, 32, 64, 4, 1)
        got = multiply(linear, x, None, qdata, scale, bias, block_size, torch.float32, launch)
        want = x.double() @ reference.dequantize_weight(qdata, scale, block_size, 0, torch.float64).t() + bias.double()
        with subtests.test(block_size=block_size):
            torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-4 * want.abs().max().item())


@pytest.fixture
def processors(device, monkeypatch):
    """A number of multiprocessors for the interpreter."""
    if device.type == "cpu":
        found = SimpleNamespace(multi_processor_count=82)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: found)


@pytest.mark.parametrize("block_size, rotate_by", [(0, 0), (0, 64), (64, 0)], ids=["row", "rotated", "block"])
@pytest.mark.parametrize("implementation", ["triton", "reference"])
def test_layers_on_gpus_without_fp8_do_not_quantize_activations(
    monkeypatch, linear, processors, device, implementation, block_size, rotate_by
):
    monkeypatch.setattr(devices, "has_fp8_matmul", lambda device: False)
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


# Launches


@pytest.mark.parametrize("rows, columns", [(1, 64), (16, 4096), (64, 64), (300, 4096), (5000, 12288)])
def test_the_shipped_launch_fills_the_gpu_or_is_the_last_one(monkeypatch, linear, processors, rows, columns):
    monkeypatch.setattr(linear, "_can_tma", lambda *operands: False)
    activations, qdata = torch.empty(rows, 64, dtype=INT8), torch.empty(columns, 64, dtype=INT8)
    launch = linear.shipped_launch(activations, qdata, 0, False)
    few = rows <= linear.FEW_ROWS
    table = linear.SHIPPED_FEW_ROWS if few else linear.SHIPPED[False]
    processors = torch.cuda.get_device_properties(activations.device).multi_processor_count
    fitting = [
        entry for least, entry in table if -(-rows // entry.rows) * -(-columns // entry.columns) >= least * processors
    ]
    assert launch == fitting[0]
    assert not launch.tma


def test_products_of_large_blocks_run_on_the_kernel_of_sm_9_0(monkeypatch, linear, processors):
    if linear.hopper is None:
        pytest.skip("this Triton has no kernel for SM 9.0")
    monkeypatch.setattr(linear, "_can_tma", lambda *operands: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(linear.hopper, "occupancy", lambda *arguments: 1.0)
    activations, qdata = torch.empty(4096, 64, dtype=INT8), torch.empty(4096, 64, dtype=INT8)
    assert linear.shipped_launch(activations, qdata, 128, False) is linear.hopper.SHIPPED
    assert linear.shipped_launch(activations, qdata, 64, False) is not linear.hopper.SHIPPED
    assert linear.shipped_launch(activations, qdata, 0, False) is not linear.hopper.SHIPPED


def test_candidates_of_autotuning_begin_with_the_shipped_launch(monkeypatch, linear, processors):
    monkeypatch.setattr(linear, "_can_tma", lambda *operands: False)
    activations, qdata = torch.empty(64, 64, dtype=INT8), torch.empty(64, 64, dtype=INT8)
    candidates = linear._candidate_launches(activations, qdata, 0, False)
    assert next(iter(candidates.values())) == linear.shipped_launch(activations, qdata, 0, False)
    assert [launch for launch in candidates.values() if launch.tma] == []


# Public layers


LINEARS = {
    "int8_block_linear": ("quantize_int8_block_weight", 64),
    "fp8_block_linear": ("quantize_fp8_block_weight", 64),
    "int8_row_linear": ("quantize_int8_row_weight", 0),
    "fp8_row_linear": ("quantize_fp8_row_weight", 0),
}


@pytest.mark.parametrize("name", LINEARS)
def test_public_layers_match_float64(subtests, device, name):
    quantize, block_size = LINEARS[name]
    blocks = {"block_size": block_size} if block_size else {}
    for dtype in (torch.float32, torch.bfloat16):
        weight, bias = random(48, 160, seed=1, device=device), random(48, seed=2, device=device, dtype=dtype)
        x = random(2, 20, 160, device=device, dtype=dtype)
        qdata, scale = getattr(kernels, quantize)(weight, *blocks.values())
        want = torch.nn.functional.linear(x.double(), weight.double(), bias.double())
        got = getattr(kernels, name)(x, qdata, scale, bias, **blocks)
        wide = getattr(kernels, name)(x, qdata, scale, bias, **blocks, out_dtype=torch.float32)
        with subtests.test(dtype=dtype):
            assert got.shape == (2, 20, 48)
            assert got.dtype is dtype
            assert (got - want).norm() / want.norm() < (0.02 if "int8" in name else 0.06)
            assert wide.dtype is torch.float32
            torch.testing.assert_close(wide.to(dtype), got, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("name", LINEARS)
def test_no_tokens_give_no_outputs(device, name):
    quantize, block_size = LINEARS[name]
    blocks = {"block_size": block_size} if block_size else {}
    qdata, scale = getattr(kernels, quantize)(random(48, 160, device=device), *blocks.values())
    assert getattr(kernels, name)(random(0, 20, 160, device=device), qdata, scale, **blocks).shape == (0, 20, 48)


def test_rotated_layers_undo_the_rotation(device):
    weight, x = random(48, 256, seed=1, device=device), random(9, 256, device=device)
    qdata, scale = kernels.quantize_int8_row_weight(rotate(weight, 64))
    got, want = kernels.int8_row_linear(x, qdata, scale, rotate_by=64), x @ weight.t()
    assert (got - want).norm() / want.norm() < 0.02
    torch.testing.assert_close(kernels.dequantize_weight(qdata, scale, rotate_by=64), weight, rtol=0, atol=0.05)


# At the sizes of real models, on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("backend", ["auto", "triton", "torch", "reference"])
def test_layers_of_real_size_match_float64(subtests, empty_cache, name, backend):
    for tokens, out, inner in (
        (1, 3072, 3072),
        (40, 320, 640),
        (256, 3072, 12288),
        (1000, 1100, 720),
        (4096, 3072, 3072),
    ):
        x, weight, bias = on_gpu(tokens, inner), on_gpu(out, inner, seed=1), on_gpu(out, seed=2)
        want = torch.nn.functional.linear(x.double(), weight.double(), bias.double())
        with subtests.test(tokens=tokens, out=out, inner=inner), kernels.using(backend):
            got = make_layer(name, weight)(x, bias)
            assert got.dtype is torch.bfloat16
            assert relative(got, want) < (0.02 if "int8" in name else 0.05)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["int8_block_linear", "fp8_block_linear"])
@pytest.mark.parametrize("out_dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_block_sizes_and_output_dtypes_match_float64(subtests, name, out_dtype):
    x, weight, bias = on_gpu(1024, 3072), on_gpu(3000, 3072, seed=1), on_gpu(3000, seed=2)
    want = torch.nn.functional.linear(x.double(), weight.double(), bias.double())
    for block_size in (32, 64, 128, 256, 1024):
        with subtests.test(block_size=block_size), kernels.using("triton"):
            got = make_layer(name, weight, block_size)(x, bias, out_dtype=out_dtype)
            assert got.dtype is out_dtype
            assert relative(got, want) < (0.02 if "int8" in name else 0.05)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["int8_block_linear", "int8_row_linear"])
def test_more_than_two_billion_elements_are_indexed(name):
    x = torch.zeros(2**31 // 2048 + 100, 2048, dtype=torch.bfloat16, device="cuda")
    x[-1] = on_gpu(2048)
    weight = on_gpu(128, 2048, seed=1)
    want = x[-1:].double() @ weight.double().t()
    with kernels.using("triton"):
        got = make_layer(name, weight)(x)
    assert relative(got[-1:], want) < 0.02
    assert not got[:-1].any()


@pytest.mark.gpu
def test_results_are_deterministic():
    x, run = on_gpu(4096, 3072), make_layer("int8_block_linear", on_gpu(3072, 3072, seed=1))
    with kernels.using("triton"):
        first = run(x)
        assert all(torch.equal(run(x), first) for _ in range(20))
