"""Kernels as torch operators: registered once, traced without graph breaks, refused with a reason."""

import importlib.util
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import torch

from learned_rounding import kernels
from learned_rounding.kernels import backends, operators, reference
from learned_rounding.quant_core.formats import E4M3
from learned_rounding.tests.kernels.gpu_layers import LAYERS, make_layer, replay_in_graph
from learned_rounding.tests.kernels.gpu_layers import random as on_gpu

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


def test_operators_pass_opcheck(subtests):
    for name, arguments in ARGUMENTS.items():
        with subtests.test(name):
            torch.library.opcheck(getattr(torch.ops.learned_rounding, name).default, arguments)


def test_fake_results_have_the_shapes_and_strides_of_real_ones(subtests):
    for dtype, block_size in product((torch.int8, torch.float8_e4m3fn), (0, 32, 64)):
        for name, arguments in (
            ("quantize_inputs", (X, dtype, block_size, 0)),
            ("quantize_weight", (X, dtype, block_size)),
        ):
            real = getattr(reference, name)(*arguments)
            fake = getattr(operators, f"_fake_{name}")(*arguments)
            with subtests.test(name, dtype=dtype, block_size=block_size):
                assert [(t.shape, t.dtype, t.stride()) for t in real] == [(t.shape, t.dtype, t.stride()) for t in fake]


def test_rounding_does_not_modify_its_arguments(subtests):
    for name, before, coupling in (
        ("apart", None, None),
        ("descent", X / 7, torch.ones(6, 6).fill_diagonal_(0)),
        ("gptq", None, torch.ones(6, 6).tril(-1)),
    ):
        arguments = [tensor for tensor in (X, X / 9, before, coupling, torch.ones(1, 1)) if tensor is not None]
        copies = [tensor.clone() for tensor in arguments]
        kernels.round_block(X, arguments[1], before, coupling, arguments[-1], 96, E4M3.arithmetic)
        with subtests.test(name):
            assert all(map(torch.equal, arguments, copies))


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


def test_refusals_name_the_unmet_need(subtests, sentences):
    for operation, arguments in (ARGUMENTS | FUNCTIONS).items():
        found = kernels.refusals(operation, *arguments)
        with subtests.test(operation):
            assert "reference" not in found
            sentences(found["triton"])


# On a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("name", LAYERS)
def test_layer_replays_in_a_cuda_graph(empty_cache, name):
    run, x = make_layer(name, on_gpu(1024, 1024, seed=1)), on_gpu(512, 1024)
    want = run(x)
    out = replay_in_graph(run, x, on_gpu(512, 1024, seed=3))
    assert not torch.equal(out, want)
    assert torch.equal(out, run(x))


@pytest.mark.gpu
@pytest.mark.parametrize("name", LAYERS)
def test_layer_of_real_size_compiles_without_a_graph_break(empty_cache, name):
    run = make_layer(name, on_gpu(1024, 1024, seed=1))
    block = torch.compile(lambda x: torch.nn.functional.gelu(run(x)) * 2, fullgraph=True)
    for tokens in (512, 384):
        x = on_gpu(tokens, 1024, seed=tokens)
        torch.testing.assert_close(block(x), torch.nn.functional.gelu(run(x)) * 2, rtol=0.02, atol=0.02)
