"""Kernel for SM 9.0: the tiles of the last wave, and the same bits as the generic kernel."""

from types import SimpleNamespace

import pytest
import torch

from learned_rounding.tests.kernels.gpu_layers import random


@pytest.fixture
def hopper(device):
    from learned_rounding.kernels.triton import linear

    if linear.hopper is None:
        pytest.skip("this Triton has no kernel for SM 9.0")
    return linear.hopper


@pytest.fixture
def processors(monkeypatch):
    """Eight multiprocessors."""
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(multi_processor_count=8))


def tiles(hopper, count: int) -> tuple[int, int]:
    """Rows and columns of a product of so many tiles."""
    return hopper.SHIPPED.rows, count * hopper.SHIPPED.columns


@pytest.mark.parametrize("count, whole, halved", [(8, 8, 0), (10, 8, 2), (12, 8, 4), (13, 13, 0), (3, 0, 3)])
def test_tiles_of_a_last_wave_that_fills_half_are_halved(hopper, processors, count, whole, halved):
    assert hopper._split_waves(*tiles(hopper, count), torch.device("cpu")) == (whole, halved, 8)


@pytest.mark.parametrize("count, expected", [(8, 1), (12, 12 / 12), (10, 10 / 12), (13, 13 / 16)])
def test_occupancy_is_the_mean_over_all_waves(hopper, processors, count, expected):
    assert hopper.occupancy(*tiles(hopper, count), torch.device("cpu")) == pytest.approx(expected)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_products_are_bit_identical_to_the_generic_kernel(subtests, hopper, dtype):
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("needs SM 9.0")
    from learned_rounding.kernels.triton import linear, quantize

    for tokens, out, inner in (
        (300, 700, 384),
        (4096, 3072, 3072),
        (2048, 12288, 1040),
        (4608, 3072, 1536),
        (513, 12200, 512),
    ):
        qdata, scale = quantize.quantize_weight(random(out, inner, seed=1), dtype, 128)
        x = random(tokens, inner)
        activations, input_scale = quantize.prepare_quantizer(x, dtype, 128, 0)(x)
        for bias in (None, random(out, seed=2)):
            operands = linear.Operands(quantize.as_bits(activations), input_scale, quantize.as_bits(qdata), scale, bias)
            launch = linear.Launch(64, 128, 128, 4, 3, tma=True)
            plain = linear.prepare_product(operands, 128, torch.bfloat16, launch)
            special = hopper.prepare_product(operands, 128, torch.bfloat16, hopper.SHIPPED)
            with subtests.test(tokens=tokens, out=out, inner=inner, bias=bias is not None):
                assert torch.equal(special(operands), plain(operands))
