"""The kernels as torch operators: registered once, traced without breaks, and refused with a reason."""

import importlib.util
import logging
import sys
from pathlib import Path

import pytest
import torch

from learned_rounding import kernels
from learned_rounding.kernels import backends, operators

X = torch.randn(6, 96, generator=torch.Generator().manual_seed(0))
CODES, SCALE = kernels.quantize_int8_block_weight(torch.randn(40, 96, generator=torch.Generator().manual_seed(1)), 32)
ARGUMENTS = {
    "quantize_inputs": (X, torch.int8, 32, 0),
    "quantize_weight": (X, torch.float8_e4m3fn, 32),
    "dequantize_weight": (CODES, SCALE, 32, 0, torch.bfloat16),
    "scaled_linear": (X, CODES, SCALE, None, 32, 0, torch.float32),
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_operators_keep_what_they_promise_torch(name):
    torch.library.opcheck(getattr(torch.ops.learned_rounding, name).default, ARGUMENTS[name])


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("block_size", [0, 32, 64])
def test_fakes_have_the_shape_and_the_strides_of_what_is_computed(dtype, block_size):
    for name in ("quantize_inputs", "quantize_weight"):
        arguments = (X, dtype, block_size, 0) if name == "quantize_inputs" else (X, dtype, block_size)
        real = backends.OPERATIONS[name]["reference"].load()(*arguments)
        fake = getattr(operators, f"_fake_{name}")(*arguments)
        assert [(t.shape, t.dtype, t.stride()) for t in real] == [(t.shape, t.dtype, t.stride()) for t in fake]


def test_a_layer_compiles_without_a_graph_break():
    def layer(x):
        return torch.relu(kernels.int8_block_linear(x, CODES, SCALE, block_size=32)) * 2

    compiled = torch.compile(layer, fullgraph=True, backend="eager", dynamic=True)
    for tokens in (6, 3):
        assert torch.equal(compiled(X[:tokens]), layer(X[:tokens]))


def test_the_package_can_be_imported_under_another_name():
    folder = Path(kernels.__file__).parent.parent
    spec = importlib.util.spec_from_file_location("twin", folder / "__init__.py", submodule_search_locations=[str(folder)])
    sys.modules["twin"] = module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        twin = importlib.import_module("twin.kernels")
        assert twin is not kernels
        got = twin.int8_block_linear(X, CODES, SCALE, block_size=32)
        assert torch.equal(got, kernels.int8_block_linear(X, CODES, SCALE, block_size=32))
    finally:
        for name in [name for name in sys.modules if name.partition(".")[0] == "twin"]:
            del sys.modules[name]


@pytest.mark.parametrize("operation", ARGUMENTS)
def test_refusals_say_what_is_missing(operation):
    found = kernels.refusals(operation, *ARGUMENTS[operation])
    assert "reference" not in found
    assert "not on a CUDA device" in found["triton"]


class OnCuda:
    """Stands for a tensor on a card."""

    is_cuda, device, dtype, shape = True, "a card", torch.float32, (6, 96)


@pytest.mark.parametrize(
    "capability, triton, x_dtype, dtype, block_size, words",
    [
        ((9, 0), False, torch.bfloat16, torch.int8, 32, "Triton for NVIDIA is not installed"),
        ((7, 5), True, torch.bfloat16, torch.int8, 32, "older than SM 8.0"),
        ((8, 6), True, torch.float32, torch.float8_e4m3fn, 32, "float16 or bfloat16"),
        ((9, 0), True, torch.float64, torch.int8, 32, "bfloat16 or float32"),
        ((9, 0), True, torch.bfloat16, torch.int8, 8, "power of two"),
        ((8, 6), True, torch.bfloat16, torch.float8_e4m3fn, 32, None),
        ((9, 0), True, torch.float32, torch.float8_e4m3fn, 0, None),
    ],
)
def test_what_triton_refuses(monkeypatch, capability, triton, x_dtype, dtype, block_size, words):
    monkeypatch.setattr(backends, "_capability", lambda device: capability)
    monkeypatch.setattr(backends, "_has_triton", lambda: triton)
    x, codes = OnCuda(), OnCuda()
    x.dtype, codes.dtype = x_dtype, dtype
    refusal = backends.OPERATIONS["scaled_linear"]["triton"].refusal(x, codes, None, None, block_size, 0, x_dtype)
    assert words in refusal if words else refusal == ""


def test_a_backend_can_be_chosen_for_a_while():
    before = kernels.backend()
    with pytest.raises(KeyError), kernels.using("reference"):
        assert kernels.backend() == "reference"
        raise KeyError
    assert kernels.backend() == before


@pytest.mark.parametrize("name, module", [("torch", "reference"), ("reference", "reference"), ("auto", "triton"), ("autotuned", "triton")])
def test_what_a_backend_means_for_operations_that_do_not_have_it(monkeypatch, name, module):
    monkeypatch.setattr(backends, "_capability", lambda device: (9, 0))
    monkeypatch.setattr(backends, "_has_triton", lambda: True)
    for entries in backends.OPERATIONS.values():
        for key, entry in entries.items():
            monkeypatch.setitem(entries, key, entry._replace(load=lambda key=key: key))
    with kernels.using(name):
        assert backends.implementation("quantize_inputs", OnCuda(), torch.int8, 0, 0) == module


def test_without_a_card_the_log_says_so_once(caplog):
    backends._say_once.cache_clear()
    with caplog.at_level(logging.INFO, logger=backends.log.name):
        for _ in range(3):
            kernels.int8_block_linear(X, CODES, SCALE, block_size=32)
    assert [record.getMessage() for record in caplog.records] == [
        "Kernels run in plain torch: the tensor is not on a CUDA device."
    ]
