"""Products with float32 accumulation: on a CPU of float32 operands, on a GPU of 16-bit operands."""

import pytest
import torch

from learned_rounding.quant_core.calibration.products import add_product, matmul_operand, multiply


def operands(dtype: torch.dtype, device: str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(64, 64, generator=generator).to(device, dtype) for _ in range(2))


def test_operands_on_a_cpu_are_float32_with_the_same_values(subtests):
    for dtype in [torch.float16, torch.bfloat16, torch.float32]:
        with subtests.test(dtype=dtype):
            values, _ = operands(dtype)
            assert matmul_operand(values).dtype is torch.float32
            assert torch.equal(matmul_operand(values), values.float())


def check_products(a: torch.Tensor, b: torch.Tensor) -> None:
    exact = a.double() @ b.double()
    found = multiply(a, b)
    assert found.dtype is torch.float32
    assert (found - exact).norm() < 1e-6 * exact.norm()
    total = torch.ones(64, 64, device=a.device)
    add_product(total, a, b)
    assert (total - 1 - exact).norm() < 1e-6 * exact.norm()


def test_products_on_a_cpu_are_those_of_float32(subtests):
    for dtype in [torch.float16, torch.bfloat16, torch.float32]:
        with subtests.test(dtype=dtype):
            check_products(*map(matmul_operand, operands(dtype)))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_products_on_a_gpu_accumulate_in_float32(dtype):
    check_products(*map(matmul_operand, operands(dtype, "cuda")))


@pytest.mark.gpu
def test_float16_operands_stay_unless_they_accumulate_in_float16(monkeypatch):
    values, _ = operands(torch.float16, "cuda")
    assert matmul_operand(values).dtype is torch.float16
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_fp16_accumulation", True)
    assert matmul_operand(values).dtype is torch.float32
