"""Every shipped kernel configuration compiles for every supported GPU generation without register spills."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

# Shared memory per program in bytes; SM 8.6 and 8.9 have less than data center GPUs.
SHARED = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
KERNELS = {
    "_round_block",
    "_round_block_beam",
    "_scale_errors",
    "_search_level_scales",
    "_quantize_blocks",
    "_quantize_rows",
    "_quantize_square_blocks",
    "_quantize_static",
    "_dequantize",
    "_expand_weight",
    "_multiply_few_tokens",
}


PRODUCTS = {90: {"_scaled_matmul", "_block_matmul"}, 100: set()}  # of SM 10.0 ComfyUI's kernels are used

pytestmark = [pytest.mark.compile, pytest.mark.timeout(3600)]


@pytest.fixture(scope="module", params=SHARED)
def compiled(request):
    """SM, and all its configurations with their resources."""
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("compile_all.py")
    done = subprocess.run([sys.executable, script, str(request.param)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return SimpleNamespace(sm=request.param, cases=[json.loads(line) for line in done.stdout.splitlines()])


def test_every_configuration_compiles(compiled):
    assert [case for case in compiled.cases if "error" in case or not case["registers"]] == []


def test_every_kernel_is_compiled(compiled):
    assert {case["kernel"] for case in compiled.cases} == KERNELS | PRODUCTS.get(compiled.sm, {"_scaled_matmul"})


def test_no_registers_are_spilled(compiled):
    assert [case for case in compiled.cases if case.get("spilled")] == []


def test_shared_memory_fits_the_gpu(compiled):
    assert [case for case in compiled.cases if case.get("shared", 0) > SHARED[compiled.sm]] == []


def test_products_run_on_tensor_cores(compiled):
    """At their full rate on SM 9.0."""

    def expected(case):
        full = case["kernel"] == "_block_matmul" or (compiled.sm == 90 and case["ROWS"] >= 64)
        return ["wgmma"] if full else ["mma.sync"]

    products = [case for case in compiled.cases if case["kernel"] in ("_scaled_matmul", "_block_matmul")]
    assert [case for case in products if case.get("products") != expected(case)] == []
