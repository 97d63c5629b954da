"""Torch's own 8-bit products: where they exist, and how their results are scaled."""

import pytest
import torch

from learned_rounding.kernels import backends, devices, reference, tensor_cores
from learned_rounding.tests.kernels.gpu_layers import LAYERS, make_layer, relative
from learned_rounding.tests.kernels.gpu_layers import random as on_gpu
from learned_rounding.tests.kernels.stubs import product

FP8 = torch.float8_e4m3fn


def refusal_of_torch(monkeypatch, capability, arguments) -> str:
    monkeypatch.setattr(devices, "compute_capability", lambda device: capability)
    monkeypatch.setattr(tensor_cores, "_has_block_scaled_mm", lambda: True)
    return backends.OPERATIONS["scaled_linear"]["torch"].refusal(*arguments)


def test_formats_and_shapes_without_a_product_are_refused(subtests, monkeypatch, sentences):
    for capability, arguments in (
        ((7, 5), product(torch.int8)),
        ((8, 0), product(torch.int8, 128)),
        ((8, 6), product(FP8)),
        ((8, 9), product(FP8, 128)),
        ((9, 0), product(FP8, 64)),
        ((9, 0), product(torch.int8, tokens=16)),
    ):
        with subtests.test(capability=capability, dtype=arguments[1].dtype, block_size=arguments[4]):
            refusal = refusal_of_torch(monkeypatch, capability, arguments)
            assert refusal
            sentences(refusal)


def test_formats_with_a_product_are_taken(subtests, monkeypatch):
    for capability, arguments in (
        ((8, 0), product(torch.int8)),
        ((8, 9), product(FP8)),
        ((9, 0), product(FP8, 128)),
    ):
        with subtests.test(capability=capability, dtype=arguments[1].dtype, block_size=arguments[4]):
            assert refusal_of_torch(monkeypatch, capability, arguments) == ""


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("with_bias", [True, False])
def test_int8_products_are_scaled_in_float32(with_bias):
    """torch has its INT8 product on a CPU too."""
    weight, x, bias = random(32, 64, seed=1), random(20, 64), random(32, seed=2) if with_bias else None
    qdata, scale = reference.quantize_weight(weight, torch.int8, 0)
    activations, input_scale = reference.quantize_inputs(x, torch.int8, 0, 0)
    want = (activations.double() * input_scale.double()) @ (qdata.double() * scale.double()).t()
    got = tensor_cores._multiply_int8(activations, input_scale, qdata.t(), scale, bias, torch.float32)
    torch.testing.assert_close(got.double(), want if bias is None else want + bias.double(), rtol=1e-5, atol=1e-5)


def test_int8_layers_match_float64():
    weight, x, bias = random(32, 64, seed=1), random(20, 64), random(32, seed=2)
    qdata, scale = reference.quantize_weight(weight, torch.int8, 0)
    arguments = x, qdata, scale, bias
    got = tensor_cores.prepare_linear(*arguments, 0, 0, torch.bfloat16)(*arguments)
    want = torch.nn.functional.linear(x.double(), weight.double(), bias.double())
    assert got.dtype is torch.bfloat16
    assert (got - want).norm() / want.norm() < 0.02


@pytest.mark.gpu
@pytest.mark.parametrize("name", LAYERS)
def test_layers_equal_those_of_plain_torch(empty_cache, name):
    from learned_rounding import kernels

    run, x = make_layer(name, on_gpu(1024, 1024, seed=1)), on_gpu(512, 1024)
    with kernels.using("reference"):
        want = run(x)
    with kernels.using("torch"):
        assert relative(run(x), want.double()) < 1e-2
