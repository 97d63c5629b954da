"""The kernels as torch operators: registered once, traced without breaks, and refused with a reason."""

import importlib.util
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from learned_rounding import kernels
from learned_rounding.kernels import backends, cards, operators, reference, tensor_cores
from learned_rounding.quant_core.formats import E4M3

X = torch.randn(6, 96, generator=torch.Generator().manual_seed(0))
CODES, SCALE = kernels.quantize_int8_block_weight(torch.randn(40, 96, generator=torch.Generator().manual_seed(1)), 32)
ARGUMENTS = {
    "quantize_inputs": (X, torch.int8, 32, 0),
    "quantize_weight": (X, torch.float8_e4m3fn, 32),
    "dequantize_weight": (CODES, SCALE, 32, 0, torch.bfloat16),
    "scaled_linear": (X, CODES, SCALE, None, 32, 0, torch.float32),
    "round_block": (X, X / 9, None, torch.ones(6, 6).tril(-1), torch.ones(1, 1), 96, *E4M3.arithmetic),
    "scale_errors": (X, torch.ones(6, 1), torch.tensor([1.0, 0.9]), X[0].square(), 1, 96, 1, *E4M3.arithmetic),
}


def test_every_operation_is_an_operator():
    assert ARGUMENTS.keys() == backends.OPERATIONS.keys()


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


@pytest.mark.parametrize(
    "before, coupling", [(None, None), (X / 7, torch.ones(6, 6).fill_diagonal_(0)), (None, torch.ones(6, 6).tril(-1))]
)
def test_rounding_leaves_its_arguments_alone(before, coupling):
    arguments = X, X / 9, before, coupling, torch.ones(1, 1)
    copies = [None if argument is None else argument.clone() for argument in arguments]
    kernels.round_block(*arguments, 96, E4M3.arithmetic)
    for argument, copy in zip(arguments, copies, strict=True):
        assert argument is copy is None or torch.equal(argument, copy)


def test_rounding_does_not_load_torchs_compiler():
    script = (
        "import sys, torch; from learned_rounding import kernels; from learned_rounding.quant_core.formats import INT8;"
        "weight, one = torch.ones(4, 4), torch.ones(1, 1);"
        "kernels.round_block(weight, weight, None, None, one, 4, INT8.arithmetic);"
        "kernels.scale_errors(weight, one, one[0], None, 4, 4, 1, INT8.arithmetic);"
        "sys.exit('torch._dynamo' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0


def test_a_layer_compiles_without_a_graph_break():
    def layer(x):
        return torch.relu(kernels.int8_block_linear(x, CODES, SCALE, block_size=32)) * 2

    compiled = torch.compile(layer, fullgraph=True, backend="eager", dynamic=True)
    for tokens in (6, 3):
        assert torch.equal(compiled(X[:tokens]), layer(X[:tokens]))


def test_the_package_can_be_imported_under_another_name():
    folder = Path(kernels.__file__).parent.parent
    spec = importlib.util.spec_from_file_location(
        "twin", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
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

    is_cuda, device = True, torch.device("cuda")

    def __init__(self, dtype=torch.float32, shape=(6, 96)):
        self.dtype, self.shape = dtype, shape


@pytest.mark.parametrize(
    "device, hip, capability, expected",
    [
        ("cpu", None, None, True),  # the arithmetic of the newer cards
        ("cuda", None, (8, 6), False),
        ("cuda", None, (8, 9), True),
        ("cuda", None, (12, 0), True),
        ("cuda", "6.4", (11, 0), False),
    ],
)
def test_which_cards_multiply_fp8(monkeypatch, device, hip, capability, expected):
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(cards, "capability", lambda device: capability)
    assert cards.multiplies_fp8(torch.device(device)) == expected


@pytest.mark.parametrize(
    "capability, triton, x_dtype, dtype, block_size, words",
    [
        ((9, 0), False, torch.bfloat16, torch.int8, 32, "Triton is not installed"),
        ((7, 5), True, torch.bfloat16, torch.int8, 32, "older than SM 8.0"),
        ((8, 6), True, torch.float32, torch.float8_e4m3fn, 32, "float16 or bfloat16"),
        ((9, 0), True, torch.float64, torch.int8, 32, "bfloat16 or float32"),
        ((9, 0), True, torch.bfloat16, torch.int8, 8, "power of two"),
        ((8, 6), True, torch.bfloat16, torch.float8_e4m3fn, 32, None),
        ((9, 0), True, torch.float32, torch.float8_e4m3fn, 0, None),
    ],
)
def test_what_triton_refuses(monkeypatch, capability, triton, x_dtype, dtype, block_size, words):
    monkeypatch.setattr(cards, "capability", lambda device: capability)
    monkeypatch.setattr(backends, "_has_triton", lambda: triton)
    arguments = OnCuda(x_dtype), OnCuda(dtype), None, None, block_size, 0, x_dtype
    find_refusal = backends.OPERATIONS["scaled_linear"]["triton"].find_refusal(*arguments)
    assert words in find_refusal if words else find_refusal == ""


@pytest.mark.parametrize(
    "columns, coupled, words",
    [(128, True, None), (129, True, "more columns"), (8, False, "do not depend on each other")],
)
def test_what_the_rounding_kernel_refuses(monkeypatch, device, columns, coupled, words):
    monkeypatch.setattr(backends, "_has_triton", lambda: True)
    arguments = OnCuda(shape=(columns, 96)), OnCuda(shape=(columns, 96)), None, "a matrix" if coupled else None
    found = kernels.refusals("round_block", *arguments, torch.ones(1, 1), 96, E4M3.arithmetic)
    assert words in found["triton"] if words else found == {}
    chosen = backends.implementation("round_block", *arguments, torch.ones(1, 1), 96, E4M3.arithmetic)
    assert (chosen is reference.round_block) == bool(words)


def product(dtype, block_size=0, tokens=64):
    """Arguments of a linear layer that torch's products take, if the card does."""
    return OnCuda(torch.bfloat16, (tokens, 256)), OnCuda(dtype, (128, 256)), None, None, block_size, 0, torch.bfloat16


@pytest.mark.parametrize(
    "capability, arguments, words",
    [
        ((7, 5), product(torch.int8), "older than SM 8.0"),
        ((8, 0), product(torch.int8), None),
        ((8, 0), product(torch.int8, 128), "no product of this format"),
        ((8, 6), product(torch.float8_e4m3fn), "no product of this format"),
        ((8, 9), product(torch.float8_e4m3fn), None),
        ((8, 9), product(torch.float8_e4m3fn, 128), "no product of this format"),
        ((9, 0), product(torch.float8_e4m3fn, 128), None),
        ((9, 0), product(torch.float8_e4m3fn, 64), "no product of this format"),
        ((9, 0), product(torch.int8, tokens=16), "more than 16 tokens"),
    ],
)
def test_what_torchs_products_refuse(monkeypatch, capability, arguments, words):
    monkeypatch.setattr(cards, "capability", lambda device: capability)
    monkeypatch.setattr(tensor_cores, "_scaled_mm_of_blocks", lambda: "there")
    find_refusal = backends.OPERATIONS["scaled_linear"]["torch"].find_refusal(*arguments)
    assert words in find_refusal if words else find_refusal == ""


@pytest.mark.parametrize("capability", [(9, 0), (10, 3), (11, 0)])  # of AMD's cards; NVIDIA's of these numbers have FP8
@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("block_size", [0, 128])
def test_amd_takes_the_reference_and_the_log_says_so_once(monkeypatch, caplog, capability, dtype, block_size):
    monkeypatch.setattr(torch.version, "hip", "6.4")
    monkeypatch.setattr(cards, "capability", lambda device: capability)
    monkeypatch.setattr(backends, "_has_triton", lambda: True)
    backends._say_once.cache_clear()
    with caplog.at_level(logging.INFO, logger=backends.log.name):
        for _ in range(2):
            assert backends.implementation("scaled_linear", *product(dtype, block_size)) is reference.scaled_linear
    assert [record.getMessage() for record in caplog.records] == [
        "Kernels run in plain torch: the card is not made by NVIDIA."
    ]


def test_a_backend_can_be_chosen_for_a_while():
    before = kernels.backend()
    with pytest.raises(KeyError), kernels.using("reference"):
        assert kernels.backend() == "reference"
        raise KeyError
    assert kernels.backend() == before


@pytest.mark.parametrize(
    "asked, expected", [(None, "auto"), ("", "auto"), ("reference", "reference"), ("tritn", "auto")]
)
def test_the_environment_chooses_a_backend_that_there_is(monkeypatch, caplog, asked, expected):
    monkeypatch.delenv(backends.VARIABLE, raising=False)
    if asked is not None:
        monkeypatch.setenv(backends.VARIABLE, asked)
    assert backends._asked_for() == expected
    wrong = asked == "tritn"
    assert [record.levelname for record in caplog.records] == ["WARNING"] * wrong
    assert all(word in caplog.text for word in ("tritn", *kernels.BACKENDS)) or not wrong


def test_a_misspelt_backend_is_said_once_and_everything_runs():
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
def test_what_a_backend_means_for_operations_that_do_not_have_it(monkeypatch, name, module):
    monkeypatch.setattr(cards, "capability", lambda device: (9, 0))
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
