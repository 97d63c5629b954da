"""Matrix products of 16-bit operands with float32 accumulation where a GPU has them, else of float32 operands."""

import torch

__all__ = ["add_product", "matmul_operand", "multiply"]


def matmul_operand(values: torch.Tensor) -> torch.Tensor:
    """Return ``values`` in 16 bits where the GPU accumulates 16-bit products in float32, else as float32."""
    # torch.__version__ is a TorchVersion, which compares version numbers.
    mixed = values.is_cuda and torch.version.hip is None and torch.__version__ >= "2.8"
    if mixed and values.dtype is torch.bfloat16:
        mixed = torch.cuda.get_device_capability(values.device) >= (8, 0)
    elif mixed and values.dtype is torch.float16:
        mixed = not torch.backends.cuda.matmul.allow_fp16_accumulation
    return values if mixed else values.float()


def add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """Compute total += a·b with float32 accumulation; ``a`` and ``b`` are from :func:`matmul_operand`."""
    if a.dtype is torch.float32:
        total.addmm_(a, b)
    else:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)


def multiply(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return a·b, float32, with float32 accumulation; ``a`` and ``b`` are from :func:`matmul_operand`."""
    return a @ b if a.dtype is torch.float32 else torch.mm(a, b, out_dtype=torch.float32)
