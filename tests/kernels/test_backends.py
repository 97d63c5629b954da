"""Backend selection: needs, refusals with a reason, fallbacks, and the environment variable."""

import logging
import os
import subprocess
import sys

import pytest
import torch

from learned_rounding import kernels
from learned_rounding.kernels import backends, devices, prepared, reference, tensor_cores
from learned_rounding.quant_core.formats import E4M3

X = torch.randn(6, 96, generator=torch.Generator().manual_seed(0))
QDATA, SCALE = kernels.quantize_int8_block_weight(torch.randn(40, 96, generator=torch.Generator().manual_seed(1)), 32)


class OnCuda:
    """Stub of a tensor on a CUDA device."""

    is_cuda, device = True, torch.device("cuda")

    def __init__(self, dtype=torch.float32, shape=(6, 96)):
        self.dtype, self.shape = dtype, shape


@pytest.mark.parametrize(
    "device, hip, capability, expected",
    [
        ("cpu", None, None, True),  # emulates the newer GPUs
        ("cuda", None, (8, 6), False),
        ("cuda", None, (8, 9), True),
        ("cuda", None, (12, 0), True),
        ("cuda", "6.4", (11, 0), False),
    ],
)
def test_fp8_matmul_needs_an_nvidia_gpu_from_sm_89(monkeypatch, device, hip, capability, expected):
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(devices, "compute_capability", lambda device: capability)
    assert devices.has_fp8_matmul(torch.device(device)) == expected


@pytest.mark.parametrize(
    "capability, triton, x_dtype, dtype, block_size",
    [
        ((9, 0), False, torch.bfloat16, torch.int8, 32),
        ((7, 5), True, torch.bfloat16, torch.int8, 32),
        ((8, 6), True, torch.float32, torch.float8_e4m3fn, 32),
        ((9, 0), True, torch.float64, torch.int8, 32),
        ((9, 0), True, torch.bfloat16, torch.int8, 8),
        ((8, 6), True, torch.bfloat16, torch.float8_e4m3fn, 32),
        ((9, 0), True, torch.float32, torch.float8_e4m3fn, 0),
    ],
)
def test_triton_refuses_unsupported_arguments(monkeypatch, capability, triton, x_dtype, dtype, block_size, sentences):
    monkeypatch.setattr(devices, "compute_capability", lambda device: capability)
    monkeypatch.setattr(backends, "has_triton", lambda: triton)
    arguments = OnCuda(x_dtype), OnCuda(dtype), None, None, block_size, 0, x_dtype
    refusal = backends.OPERATIONS["scaled_linear"]["triton"].refusal(*arguments)
    sentences(refusal)


@pytest.mark.parametrize(
    "columns, coupled, refused",
    [(128, True, False), (129, True, True), (8, False, True)],
)
def test_rounding_kernel_refuses_unsupported_blocks(monkeypatch, device, columns, coupled, refused, sentences):
    monkeypatch.setattr(backends, "has_triton", lambda: True)
    arguments = OnCuda(shape=(columns, 96)), OnCuda(shape=(columns, 96)), None, "a matrix" if coupled else None
    found = kernels.refusals("round_block", *arguments, torch.ones(1, 1), 96, E4M3.arithmetic)
    assert set(found) == ({"triton"} if refused else set())
    sentences(found.values())
    chosen = backends.implementation("round_block", *arguments, torch.ones(1, 1), 96, E4M3.arithmetic)
    assert (chosen is reference.round_block) == refused


def product(dtype, block_size=0, tokens=64):
    """Arguments of a linear layer that torch's products support on a suitable GPU."""
    return OnCuda(torch.bfloat16, (tokens, 256)), OnCuda(dtype, (128, 256)), None, None, block_size, 0, torch.bfloat16


@pytest.mark.parametrize(
    "capability, arguments",
    [
        ((7, 5), product(torch.int8)),
        ((8, 0), product(torch.int8)),
        ((8, 0), product(torch.int8, 128)),
        ((8, 6), product(torch.float8_e4m3fn)),
        ((8, 9), product(torch.float8_e4m3fn)),
        ((8, 9), product(torch.float8_e4m3fn, 128)),
        ((9, 0), product(torch.float8_e4m3fn, 128)),
        ((9, 0), product(torch.float8_e4m3fn, 64)),
        ((9, 0), product(torch.int8, tokens=16)),
    ],
)
def test_torchs_products_refuse_unsupported_formats_and_shapes(monkeypatch, capability, arguments, sentences):
    monkeypatch.setattr(devices, "compute_capability", lambda device: capability)
    monkeypatch.setattr(tensor_cores, "_has_block_scaled_mm", lambda: True)
    refusal = backends.OPERATIONS["scaled_linear"]["torch"].refusal(*arguments)
    sentences(refusal)


@pytest.mark.parametrize(
    "capability", [(9, 0), (10, 3), (11, 0)]
)  # numbers of AMD GPUs; NVIDIA GPUs with these numbers have FP8
@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("block_size", [0, 128])
def test_amd_gpus_use_the_reference_and_log_it_once(monkeypatch, caplog, capability, dtype, block_size, sentences):
    monkeypatch.setattr(torch.version, "hip", "6.4")
    monkeypatch.setattr(devices, "compute_capability", lambda device: capability)
    monkeypatch.setattr(backends, "has_triton", lambda: True)
    backends._log_once.cache_clear()
    with caplog.at_level(logging.INFO, logger=backends.log.name):
        for _ in range(2):
            assert backends.implementation("scaled_linear", *product(dtype, block_size)) is reference.prepare_linear
    sentences(caplog.messages)


def test_using_restores_the_previous_backend():
    before = kernels.backend()
    with pytest.raises(KeyError), kernels.using("reference"):
        assert kernels.backend() == "reference"
        raise KeyError
    assert kernels.backend() == before


@pytest.mark.parametrize(
    "asked, expected", [(None, "auto"), ("", "auto"), ("reference", "reference"), ("tritn", "auto")]
)
def test_environment_selects_a_valid_backend(monkeypatch, caplog, asked, expected, sentences):
    monkeypatch.delenv(backends.VARIABLE, raising=False)
    if asked is not None:
        monkeypatch.setenv(backends.VARIABLE, asked)
    assert backends._read_environment() == expected
    wrong = asked == "tritn"
    assert [record.levelname for record in caplog.records] == ["WARNING"] * wrong
    sentences(caplog.messages)


def test_unknown_backend_in_the_environment_is_logged_once():
    script = (
        "import torch; from learned_rounding import kernels;"
        "weight, one = torch.ones(4, 4), torch.ones(1, 1); kernels.round_block(weight, weight, None, None, one, 4, (-1, 1.0, 127.0));"
        "kernels.quantize_int8_row(weight)\nwith kernels.using(kernels.backend()): print(kernels.backend())"
    )
    environment = {**os.environ, backends.VARIABLE: "tritn"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert done.stdout == "auto\n" and done.stderr.count("tritn") == 1


@pytest.mark.parametrize(
    "name, module", [("torch", "reference"), ("reference", "reference"), ("auto", "triton"), ("autotuned", "triton")]
)
def test_backend_falls_back_for_operations_without_it(monkeypatch, name, module):
    monkeypatch.setattr(devices, "compute_capability", lambda device: (9, 0))
    monkeypatch.setattr(backends, "has_triton", lambda: True)
    for entries in backends.OPERATIONS.values():
        for key, entry in entries.items():
            monkeypatch.setitem(entries, key, entry._replace(load=lambda key=key: key))
    with kernels.using(name):
        assert backends.implementation("quantize_inputs", OnCuda(), torch.int8, 0, 0) == module


def test_missing_gpu_is_logged_once(caplog, sentences):
    backends._log_once.cache_clear()
    prepared._kept.clear()  # an implementation is chosen, and its reason logged, once per shape
    with caplog.at_level(logging.INFO, logger=backends.log.name):
        for _ in range(3):
            kernels.int8_block_linear(X, QDATA, SCALE, block_size=32)
    sentences(caplog.messages)
