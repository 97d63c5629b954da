"""Compiles every shipped configuration for one card, without a GPU: python compile_all.py SM. Prints a JSON line each.

A process of its own, because kernels that were imported for the interpreter cannot be compiled.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from learned_rounding.kernels.triton import rounding
from learned_rounding.quant_core.formats import E4M3, E5M2, INT8

F32, I32 = "*fp32", "i32"
BLOCK = dict.fromkeys(("weight", "shift", "before", "coupling", "scale", "errors"), F32) | {"values": "*fp16"}
BLOCK |= dict.fromkeys(("columns", "rows", "tile_rows", "scale_column_stride", "row_stride"), I32)
SEARCH = dict.fromkeys(("scale", "ratios", "column_weight", "errors"), F32) | {"weight": "*bf16"}
SEARCH |= dict.fromkeys(
    ("out", "inner", "row_stride", "candidates", "tile_rows", "tile_columns", "tiles", "group", "groups"), I32
)


def cases():
    """(kernel, argument types, constexpr values, warps)"""
    for grid in (E4M3, E5M2, INT8):
        numbers = rounding.grid_constants(grid.arithmetic)
        config, warps = rounding.CONFIGS["round_block"]
        for flag in (False, True):
            yield rounding._round_block, BLOCK, {"HAS_BEFORE": flag, **numbers, **config}, warps
        config, warps = rounding.CONFIGS["scale_errors"]
        for shape in (config, rounding.square_tile(128), rounding.square_tile(8)):
            for flag in (False, True):
                yield rounding._scale_errors, SEARCH, {"HAS_WEIGHT": flag, **numbers, **shape, "CANDIDATES": 32}, warps


def compile_case(kernel, types, constants, warps, sm):
    """Registers and bytes spilled to local memory."""
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names) if signature[name][0] == "*"}
    fixed = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=fixed, attrs=aligned)
    made = triton.compile(source, target=GPUTarget("cuda", sm, 32), options={"num_warps": warps})
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        usage = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    registers, local = re.search(r"REG:(\d+).*?LOCAL:(\d+)", usage.stdout).groups()
    return int(registers), int(local)


if __name__ == "__main__":
    for kernel, types, constants, warps in cases():
        registers, local = compile_case(kernel, types, constants, warps, int(sys.argv[1]))
        print(json.dumps({"kernel": kernel.__name__, **constants, "registers": registers, "spilled": local}))
