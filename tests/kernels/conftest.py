"""Select Triton's interpreter on machines without a GPU, before the kernels are imported."""

import functools
import importlib.util
import inspect
import os

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Device of the Triton kernels: a GPU, or the CPU with the interpreter."""
    pytest.importorskip("triton")
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True, scope="session")
def bfloat16_products():
    """Patch Triton's interpreter, whose dot product multiplies the bits of bfloat16 operands as integers."""
    if os.environ.get("TRITON_INTERPRET") != "1" or importlib.util.find_spec("triton") is None:
        return
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    multiply = InterpreterBuilder.create_dot

    def to_float32(operand):
        if operand.dtype.scalar != tl.bfloat16:
            return operand
        bits = operand.data.astype(np.uint32) << 16
        return TensorHandle(bits.view(np.float32), tl.float32)

    def create_dot(self, a, b, *rest):
        return multiply(self, to_float32(a), to_float32(b), *rest)

    InterpreterBuilder.create_dot = create_dot


@pytest.fixture(autouse=True, scope="session")
def quick_interpreter():
    """Have Triton's interpreter list the functions of ``triton.language`` once, not at each call of a device function."""
    if os.environ.get("TRITON_INTERPRET") != "1" or importlib.util.find_spec("triton") is None:
        return
    import triton.language as tl
    from triton.runtime import interpreter

    @functools.cache
    def names(package):
        return [name for name, member in inspect.getmembers(package) if tl.core.is_builtin(member)]

    def patch_builtin(package, builder, scope):
        for name in names(package):
            member = getattr(package, name)
            if tl.core.is_builtin(member):  # not one that is patched already
                interpreter._patch_attr(package, name, member, builder, scope)

    interpreter._patch_builtin = patch_builtin


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    """Path of an empty measurement cache; no function is kept from other tests' measurements."""
    from learned_rounding.kernels import prepared, tuning

    monkeypatch.setenv(tuning.CACHE_VARIABLE, str(tmp_path))
    prepared._kept.clear()
    tuning._load_cache.cache_clear()
    yield tuning.cache_file()
    tuning._load_cache.cache_clear()
