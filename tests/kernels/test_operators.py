"""Kernels as torch operators: registered once, traced without graph breaks, refused with a reason."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from learned_rounding import kernels
from learned_rounding.kernels import backends, operators, reference
from learned_rounding.quant_core.formats import E4M3

X = torch.randn(6, 96, generator=torch.Generator().manual_seed(0))
QDATA, SCALE = kernels.quantize_int8_block_weight(torch.randn(40, 96, generator=torch.Generator().manual_seed(1)), 32)
ARGUMENTS = {
    "quantize_inputs": (X, torch.int8, 32, 0),
    "quantize_weight": (X, torch.float8_e4m3fn, 32),
    "dequantize_weight": (QDATA, SCALE, 32, 0, torch.bfloat16),
    "scaled_linear": (X, QDATA, SCALE, None, 32, 0, torch.float32),
    "w4a8_linear": (
        X,
        torch.arange(40 * 48, dtype=torch.int32).to(torch.int8).view(40, 48),
        torch.ones(40, 6),
        torch.ones(40),
        None,
        None,
        16,
        torch.bfloat16,
    ),
}
# Operations of quantization, which no graph contains.
FUNCTIONS = {
    "expand_weight": (*ARGUMENTS["w4a8_linear"][1:3], None),
    "round_block": (X, X / 9, None, torch.ones(6, 6).tril(-1), torch.ones(1, 1), 96, E4M3.arithmetic),
    "round_block_beam": (
        X,
        X / 9,
        torch.ones(6, 6).tril(-1),
        torch.ones(6),
        torch.ones(1, 1),
        96,
        E4M3.arithmetic,
        4,
    ),
    "scale_errors": (X, torch.ones(6, 1), torch.tensor([1.0, 0.9]), X[0].square(), 1, 96, 1, E4M3.arithmetic),
    "search_level_scales": (
        X,
        torch.full((6, 6), 40, dtype=torch.uint8),
        torch.arange(-8.0, 8.0),
        X[0].square(),
        2,
        127.0,
    ),
}


def test_every_operation_has_operator_arguments():
    assert ARGUMENTS.keys() | FUNCTIONS.keys() == backends.OPERATIONS.keys()


@pytest.mark.parametrize("name", ARGUMENTS)
def test_operators_pass_opcheck(name):
    torch.library.opcheck(getattr(torch.ops.learned_rounding, name).default, ARGUMENTS[name])


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("block_size", [0, 32, 64])
def test_fake_results_have_the_shapes_and_strides_of_real_ones(dtype, block_size):
    for name in ("quantize_inputs", "quantize_weight"):
        arguments = (X, dtype, block_size, 0) if name == "quantize_inputs" else (X, dtype, block_size)
        real = getattr(reference, name)(*arguments)
        fake = getattr(operators, f"_fake_{name}")(*arguments)
        assert [(t.shape, t.dtype, t.stride()) for t in real] == [(t.shape, t.dtype, t.stride()) for t in fake]


@pytest.mark.parametrize(
    "before, coupling", [(None, None), (X / 7, torch.ones(6, 6).fill_diagonal_(0)), (None, torch.ones(6, 6).tril(-1))]
)
def test_rounding_does_not_modify_its_arguments(before, coupling):
    arguments = X, X / 9, before, coupling, torch.ones(1, 1)
    copies = [None if argument is None else argument.clone() for argument in arguments]
    kernels.round_block(*arguments, 96, E4M3.arithmetic)
    for argument, copy in zip(arguments, copies, strict=True):
        assert argument is copy is None or torch.equal(argument, copy)


def test_rounding_does_not_import_torchs_compiler():
    script = (
        "import sys, torch; from learned_rounding import kernels; from learned_rounding.quant_core.formats import INT8;"
        "weight, one = torch.ones(4, 4), torch.ones(1, 1);"
        "kernels.round_block(weight, weight, None, None, one, 4, INT8.arithmetic);"
        "kernels.scale_errors(weight, one, one[0], None, 4, 4, 1, INT8.arithmetic);"
        "sys.exit('torch._dynamo' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0


def test_layer_compiles_without_a_graph_break():
    def layer(x):
        return torch.relu(kernels.int8_block_linear(x, QDATA, SCALE, block_size=32)) * 2

    compiled = torch.compile(layer, fullgraph=True, backend="eager", dynamic=True)
    for tokens in (6, 3):
        assert torch.equal(compiled(X[:tokens]), layer(X[:tokens]))


def test_backward_is_refused():
    out = kernels.int8_block_linear(X.clone().requires_grad_(), QDATA, SCALE, block_size=32)
    with pytest.raises(NotImplementedError, match="no gradient"):
        out.sum().backward()


def test_package_can_be_imported_under_a_second_name():
    folder = Path(kernels.__file__).parent.parent
    spec = importlib.util.spec_from_file_location(
        "twin", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    sys.modules["twin"] = module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        twin = importlib.import_module("twin.kernels")
        assert twin is not kernels
        got = twin.int8_block_linear(X, QDATA, SCALE, block_size=32)
        assert torch.equal(got, kernels.int8_block_linear(X, QDATA, SCALE, block_size=32))
    finally:
        for name in [name for name in sys.modules if name.partition(".")[0] == "twin"]:
            del sys.modules[name]


@pytest.mark.parametrize("operation", [*ARGUMENTS, *FUNCTIONS])
def test_refusals_name_the_unmet_need(operation, sentences):
    found = kernels.refusals(operation, *(ARGUMENTS | FUNCTIONS)[operation])
    assert "reference" not in found
    sentences(found["triton"])


@pytest.mark.parametrize(
    "call",
    [
        lambda x, qdata, scale: kernels.int8_block_linear(x[:, :64], qdata, scale, block_size=32),
        lambda x, qdata, scale: kernels.int8_block_linear(x, qdata, scale),
        lambda x, qdata, scale: kernels.fp8_block_linear(x, qdata, scale, block_size=32),
        lambda x, qdata, scale: kernels.int8_block_linear(x, qdata, scale, torch.ones(3), block_size=32),
        lambda x, qdata, scale: kernels.int8_row_linear(x, qdata, scale, rotate_by=256),
        lambda x, qdata, scale: kernels.int8_row_linear(x, qdata, scale, rotate_by=5),
        lambda x, qdata, scale: kernels.scaled_linear(x, qdata, scale, block_size=32, rotate_by=16),
        lambda x, qdata, scale: kernels.dequantize_weight(qdata, scale, block_size=32, rotate_by=16),
        lambda x, qdata, scale: kernels.quantize_int8_block(x, 0),
        lambda x, qdata, scale: kernels.backend("fast"),
    ],
)
def test_invalid_arguments_raise_a_value_error_with_the_reason(call, sentences):
    x = torch.ones(2, 96)
    with sentences.raises(ValueError):
        call(x, *kernels.quantize_int8_block_weight(torch.ones(8, 96), 32))
