"""Out-of-memory errors of torch, CUDA and Python become one error; other errors pass."""

import pytest
import torch

from learned_rounding.quant_core.errors import OutOfMemoryError
from learned_rounding.quant_core.run.memory import explain_out_of_memory

ERRORS = [
    MemoryError(),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 10 bytes"),
    RuntimeError("DefaultCPUAllocator: not enough memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)"),
]


def test_lack_of_memory_is_one_error_with_what_to_do(subtests):
    for error in ERRORS:
        with subtests.test(error):
            with (
                pytest.raises(OutOfMemoryError) as raised,
                explain_out_of_memory("cuda has too little memory for a model"),
            ):
                raise error
            assert str(raised.value) == (
                "cuda has too little memory for a model; close other programs and models, or choose another device or a lighter "
                "rounding."
            )
            assert raised.value.__cause__ is error


def test_other_errors_pass(subtests):
    for error in [RuntimeError("shapes do not match"), ValueError("out of memory")]:
        with subtests.test(error=error):
            with pytest.raises(type(error)) as raised, explain_out_of_memory("problem"):
                raise error
            assert raised.value is error
