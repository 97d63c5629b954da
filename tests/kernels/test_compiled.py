"""Every shipped kernel configuration compiles for every supported GPU generation without register spills."""

import json
import os
import subprocess
import sys
from pathlib import Path

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


@pytest.mark.parametrize("sm", SHARED)
def test_shipped_configurations_compile_without_spills(sm):
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("compile_all.py")
    done = subprocess.run([sys.executable, script, str(sm)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    compiled = [json.loads(line) for line in done.stdout.splitlines()]
    products = {90: {"_scaled_matmul", "_block_matmul"}, 100: set()}.get(sm, {"_scaled_matmul"})
    assert {case["kernel"] for case in compiled} == KERNELS | products
    assert [case for case in compiled if case["spilled"] or not case["registers"]] == []
    assert [case for case in compiled if case["shared"] > SHARED[sm]] == []
    for case in compiled:
        if case["kernel"] == "_block_matmul" or (
            case["kernel"] == "_scaled_matmul" and sm == 90 and case["ROWS"] >= 64
        ):
            assert case["products"] == ["wgmma"], case  # full tensor core rate on SM 9.0
        elif case["kernel"] == "_scaled_matmul":
            assert case["products"] == ["mma.sync"], case
