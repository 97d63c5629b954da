"""Backend selection: needs, refusals with a reason, fallbacks, and the environment variable."""

import logging
import os
import subprocess
import sys

import pytest
import torch

from learned_rounding import kernels
from learned_rounding.kernels import backends, devices, prepared, reference
from learned_rounding.quant_core.formats import E4M3
from learned_rounding.tests.kernels.stubs import OnCuda, product

X = torch.randn(6, 96, generator=torch.Generator().manual_seed(0))
QDATA, SCALE = kernels.quantize_int8_block_weight(torch.randn(40, 96, generator=torch.Generator().manual_seed(1)), 32)


UNSUPPORTED = [  # capability, whether Triton is installed, dtypes of activations and weight, block size
    ((9, 0), False, torch.bfloat16, torch.int8, 32),
    ((7, 5), True, torch.bfloat16, torch.int8, 32),
    ((8, 6), True, torch.float32, torch.float8_e4m3fn, 32),
    ((9, 0), True, torch.float64, torch.int8, 32),
    ((9, 0), True, torch.bfloat16, torch.int8, 8),
]
SUPPORTED = [
    ((8, 6), True, torch.bfloat16, torch.float8_e4m3fn, 32),
    ((9, 0), True, torch.float32, torch.float8_e4m3fn, 0),
]


def refusal_of_triton(monkeypatch, capability, triton, x_dtype, dtype, block_size) -> str:
    monkeypatch.setattr(devices, "compute_capability", lambda device: capability)
    monkeypatch.setattr(backends, "has_triton", lambda: triton)
    arguments = OnCuda(x_dtype), OnCuda(dtype), None, None, block_size, 0, x_dtype
    return backends.OPERATIONS["scaled_linear"]["triton"].refusal(*arguments)


def test_triton_refuses_unsupported_arguments(subtests, monkeypatch, sentences):
    for case in UNSUPPORTED:
        with subtests.test(case=case):
            refusal = refusal_of_triton(monkeypatch, *case)
            assert refusal
            sentences(refusal)


def test_triton_takes_supported_arguments(subtests, monkeypatch):
    for case in SUPPORTED:
        with subtests.test(case=case):
            assert refusal_of_triton(monkeypatch, *case) == ""


@pytest.mark.parametrize("columns, coupled, refused", [(128, True, False), (129, True, True), (8, False, True)])
def test_rounding_kernel_refuses_unsupported_blocks(monkeypatch, device, columns, coupled, refused, sentences):
    monkeypatch.setattr(backends, "has_triton", lambda: True)
    arguments = OnCuda(shape=(columns, 96)), OnCuda(shape=(columns, 96)), None, "a matrix" if coupled else None
    found = kernels.refusals("round_block", *arguments, torch.ones(1, 1), 96, E4M3.arithmetic)
    assert set(found) == ({"triton"} if refused else set())
    sentences(found.values())
    chosen = backends.implementation("round_block", *arguments, torch.ones(1, 1), 96, E4M3.arithmetic)
    assert (chosen is reference.round_block) == refused


def test_amd_gpus_use_the_reference_and_log_it_once(subtests, monkeypatch, caplog, sentences):
    """Capability numbers of AMD GPUs; NVIDIA GPUs with these numbers have FP8."""
    monkeypatch.setattr(torch.version, "hip", "6.4")
    monkeypatch.setattr(backends, "has_triton", lambda: True)
    for capability, dtype, block_size in (
        ((9, 0), torch.int8, 0),
        ((9, 0), torch.float8_e4m3fn, 128),
        ((10, 3), torch.float8_e4m3fn, 0),
        ((11, 0), torch.int8, 128),
    ):
        monkeypatch.setattr(devices, "compute_capability", lambda device, capability=capability: capability)
        backends._log_once.cache_clear()
        caplog.clear()
        with subtests.test(capability=capability, dtype=dtype, block_size=block_size):
            with caplog.at_level(logging.INFO, logger=backends.log.name):
                chosen = [backends.implementation("scaled_linear", *product(dtype, block_size)) for _ in range(2)]
            assert chosen == [reference.prepare_linear] * 2
            assert len(caplog.messages) == 1
            sentences(caplog.messages)


def test_using_restores_the_previous_backend():
    before = kernels.backend()
    with pytest.raises(KeyError), kernels.using("reference"):
        assert kernels.backend() == "reference"
        raise KeyError
    assert kernels.backend() == before


def test_environment_selects_a_valid_backend(subtests, monkeypatch):
    for asked, expected in (("", "auto"), ("reference", "reference")):
        monkeypatch.setenv(backends.VARIABLE, asked)
        with subtests.test(asked):
            assert backends._read_environment() == expected
    monkeypatch.delenv(backends.VARIABLE)
    assert backends._read_environment() == "auto"


def test_unknown_backend_in_the_environment_is_replaced_with_a_warning(monkeypatch, caplog, sentences):
    monkeypatch.setenv(backends.VARIABLE, "tritn")
    assert backends._read_environment() == "auto"
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    sentences(caplog.messages)


def test_unknown_backend_is_refused(sentences):
    with sentences.raises(ValueError):
        kernels.backend("fast")


@pytest.mark.soak
def test_unknown_backend_in_the_environment_is_logged_once():
    script = (
        "import torch; from learned_rounding import kernels;"
        "weight, one = torch.ones(4, 4), torch.ones(1, 1); kernels.round_block(weight, weight, None, None, one, 4, (-1, 1.0, 127.0));"
        "kernels.quantize_int8_row(weight)\nwith kernels.using(kernels.backend()): print(kernels.backend())"
    )
    environment = {**os.environ, backends.VARIABLE: "tritn"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert done.stdout == "auto\n"
    assert done.stderr.count("tritn") == 1


def test_backend_falls_back_for_operations_without_it(subtests, monkeypatch):
    monkeypatch.setattr(devices, "compute_capability", lambda device: (9, 0))
    monkeypatch.setattr(backends, "has_triton", lambda: True)
    for entries in backends.OPERATIONS.values():
        for key, entry in entries.items():
            monkeypatch.setitem(entries, key, entry._replace(load=lambda key=key: key))
    for name, expected in (
        ("torch", "reference"),
        ("reference", "reference"),
        ("auto", "triton"),
        ("autotuned", "triton"),
    ):
        with subtests.test(name), kernels.using(name):
            assert backends.implementation("quantize_inputs", OnCuda(), torch.int8, 0, 0) == expected


def test_missing_gpu_is_logged_once(caplog, sentences):
    backends._log_once.cache_clear()
    prepared._kept.clear()  # an implementation is chosen, and its reason logged, once per shape
    with caplog.at_level(logging.INFO, logger=backends.log.name):
        for _ in range(3):
            kernels.int8_block_linear(X, QDATA, SCALE, block_size=32)
    sentences(caplog.messages)
