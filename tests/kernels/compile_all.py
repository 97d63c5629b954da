"""Compile every shipped configuration for one SM, without a GPU: python compile_all.py SM. Prints one JSON line each.

A line has the configuration and its resources, or the error. Results are kept between runs, see compile_cache.py.
Runs in a separate process, because kernels imported for the interpreter cannot be compiled.
"""

import inspect
import json
import re
import subprocess
import sys
import tempfile
from functools import partial
from itertools import product
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource

from learned_rounding.kernels.reference import LARGEST
from learned_rounding.kernels.triton import beam, grouped_levels, hopper, linear, quantize, rounding
from learned_rounding.quant_core.formats import E2M1, E4M3, INT8
from learned_rounding.tests.kernels.compile_cache import CompileCache, compile_cache_file, make_key
from learned_rounding.tests.kernels.element_formats import ELEMENTS

F32, I32 = "*fp32", "i32"
BLOCK = dict.fromkeys(("weight", "shift", "before", "coupling", "scale", "codes", "level_scale", "errors"), F32) | {
    "values": "*fp16"
}
LEVELS = (0, 16, 63)  # of a group: any element, a codebook, 6-bit integers
BLOCK |= dict.fromkeys(("columns", "rows", "group_rows", "scale_column_stride", "row_stride"), I32)
BEAM = BLOCK | {"column_cost": F32, "survivors": "*i32"}
del BEAM["before"]
SEARCH = dict.fromkeys(("scale", "ratios", "column_weight", "errors"), F32) | {"weight": "*bf16"}
SEARCH |= dict.fromkeys(
    ("out", "inner", "row_stride", "candidates", "group_rows", "group_columns", "groups", "sum_rows", "sums"), I32
)
SEARCH_LEVELS = dict.fromkeys(("values", "codes", "column_weight", "errors"), F32)
SEARCH_LEVELS |= dict.fromkeys(("bits", "best_bits"), "*u8")
SEARCH_LEVELS |= dict.fromkeys(("groups", "row_stride", "count", "steps"), I32)
QUANTIZE = {"x": "*bf16", "weight": "*bf16", "scale": F32}
QUANTIZE |= dict.fromkeys(("rows", "columns", "x_stride", "stride", "scale_stride", "row_scaled", "blocks"), I32)
PRODUCT = {"out": "*bf16", "bias": "*bf16", "input_scale": F32, "scale": F32, "row_scaled": I32}
PRODUCT |= dict.fromkeys(
    ("rows", "columns", "inner", "first", "units", "a_stride", "b_stride", "input_scale_stride", "scale_stride"), I32
)
LEVEL_WEIGHT = {"packed": "*i8", "codebook": F32, "values": "*i8", "units": I32}
LEVEL_PRODUCT = LEVEL_WEIGHT | {"x": "*i8", "out": "*bf16", "bias": "*bf16", "sums": "*i32", "arrived": "*i32"}
LEVEL_PRODUCT |= dict.fromkeys(("group_scale", "input_scale", "scale"), F32)
LEVEL_PRODUCT |= dict.fromkeys(("rows", "columns", "steps"), I32)
# Sizes that are multiples of 16 in real models; at run time Triton specializes on this property.
EVEN = {"columns", "inner", "x_stride", "stride", "a_stride", "b_stride"}

# Kernels without fused multiply-add.
SEPARATE = {
    beam._round_block_beam,
    quantize._quantize_blocks,
    quantize._quantize_rows,
    quantize._quantize_square_blocks,
    grouped_levels._expand_weight,
    grouped_levels._multiply_few_tokens,
}


def rounding_cases():
    for element in ELEMENTS.values():
        numbers = rounding.element_constants(element.arithmetic)
        config, warps = rounding.CONFIGS["round_block"]
        for flag, levels in product((False, True), LEVELS if element == INT8 else (0,)):
            constants = {"HAS_BEFORE": flag, "LEVELS": levels, **numbers, **config}
            yield rounding._round_block, BLOCK, constants, warps, 3
        config, warps = rounding.CONFIGS["scale_errors"]
        for shape in (config, rounding.square_group_config(128), rounding.square_group_config(8)):
            for flag in (False, True):
                yield (
                    rounding._scale_errors,
                    SEARCH,
                    {"HAS_WEIGHT": flag, **numbers, **shape, "CANDIDATES": 32},
                    warps,
                    3,
                )


def beam_cases():
    warps = beam.CONFIG[1]
    for element, levels, width in (
        (INT8, 0, 8),
        (INT8, 0, 4),
        (INT8, 16, 8),
        (INT8, 63, 8),
        (E2M1, 0, 8),
        (E4M3, 0, 16),
    ):
        numbers = rounding.element_constants(element.arithmetic)
        yield beam._round_block_beam, BEAM, {"LEVELS": levels, **numbers, **beam.beam_config(width)}, warps, 3


def level_cases():
    warps = rounding.CONFIGS["search_level_scales"][1]
    for columns, levels, flag in product((16, 128), LEVELS[1:], (False, True)):
        constants = {"HAS_WEIGHT": flag, "LEVELS": levels, "LARGEST": INT8.max, **rounding.level_groups_config(columns)}
        yield rounding._search_level_scales, SEARCH_LEVELS, constants, warps, 3


def w4a8_cases():
    for e4m3, codebook in product((True, False), (True, False)):
        scale = "*u8" if e4m3 else F32
        constants = {"E4M3": e4m3, "HAS_CODEBOOK": codebook, "PER_GROUP": 1, "PTX": True}
        config, warps = grouped_levels.EXPAND
        yield grouped_levels._expand_weight, LEVEL_WEIGHT | {"scale": scale}, {**constants, **config}, warps, 3
        for rows, launch in grouped_levels.FEW_TOKENS.items():
            for splits in (1, 4):
                tile = {
                    "HAS_BIAS": True,
                    "SPLITS": splits,
                    "ROWS": rows,
                    "COLUMNS": launch.columns,
                    "UNITS": launch.units,
                }
                types = LEVEL_PRODUCT | {"group_scale": scale}
                yield grouped_levels._multiply_few_tokens, types, {**constants, **tile}, launch.warps, 3


def quantizing_cases(sm):
    for dtype, largest in LARGEST.items():
        integer, native = dtype.itemsize == 1 and not dtype.is_floating_point, sm >= 89
        types = QUANTIZE | {"qdata": "*i8" if integer else "*u8"}
        numbers = {"LARGEST": largest, "INTEGER": integer, "NATIVE": native}
        warps = quantize.CONFIGS["quantize_blocks"][1]
        for width in (16, 128, 1024):
            yield quantize._quantize_blocks, types, numbers | quantize.blocks_config(width), warps, 3
        for columns in (640, 3072, 18432, 49152):
            for group in (0, 64, 256):
                config, warps = quantize.rows_config(columns, group)
                yield quantize._quantize_rows, types, {**numbers, "GROUP": group, **config}, warps, 3
        if not integer:
            config, warps = quantize.CONFIGS["quantize_static"]
            static = {"LARGEST": largest, "NATIVE": native, **config}
            yield quantize._quantize_static, types | {"count": "i32"}, static, warps, 3
        warps = quantize.CONFIGS["quantize_square_blocks"][1]
        for size in (16, 128, 1024):
            yield quantize._quantize_square_blocks, types, numbers | quantize.square_blocks_config(size), warps, 3
        del numbers["LARGEST"]
        for block, group in ((0, 0), (0, 16), (0, 256), (64, 0), (128, 0)):
            config = quantize.dequantize_config(block)
            types = types | {"weight": "*bf16"}
            yield quantize._dequantize, types, {**numbers, "BLOCK": block, "GROUP": group, **config}, 4, 3


def product_cases(sm):
    shipped = [launch for row in (linear.SHIPPED_FEW_ROWS, *linear.SHIPPED.values()) for _, launch in row]
    launches = dict.fromkeys((*shipped, *linear.CANDIDATES))
    for dtype in LARGEST:
        integer = not dtype.is_floating_point
        decode = not integer and sm < 89
        kind = "i8" if integer else "u8"
        for launch in launches:
            if launch.tma and sm < 90:
                continue
            for block in (0, 64, 128):
                inner = min(launch.inner, block) if block else launch.inner
                a, b = "*bf16" if decode else f"*{kind}", f"*{kind}"
                if launch.tma:
                    a, b = (f"tensordesc<{kind}[{side},{inner}]>" for side in (launch.rows, launch.columns))
                constants = {"INTEGER": integer, "DECODE": decode, "BLOCK": block, "HAS_BIAS": True, "EVEN": True}
                constants |= {"TMA": launch.tma, "ROWS": launch.rows, "COLUMNS": launch.columns, "INNER": inner}
                yield linear._scaled_matmul, PRODUCT | {"a": a, "b": b}, constants, launch.warps, launch.stages


def hopper_cases():
    launch = hopper.SHIPPED
    for dtype, kind in ((hopper.gl.int8, "i8"), (hopper.gl.float8e4nv, "fp8e4nv")):
        for parts in (4, 2):
            tiles = [launch.rows, launch.inner], [parts * launch.part, launch.inner]
            layouts = (hopper.gl.NVMMASharedLayout.get_default_for(tile, dtype) for tile in tiles)
            a, b = (
                f"tensordesc<{kind}[{side},{width}],{layout!r}>"
                for (side, width), layout in zip(tiles, layouts, strict=True)
            )
            constants = {
                "INTEGER": kind == "i8",
                "BLOCK": 128,
                "HAS_BIAS": True,
                "ROWS": launch.rows,
                "PART": launch.part,
            }
            constants |= {"INNER": launch.inner, "STAGES": launch.stages, "PARTS": parts}
            yield hopper._block_matmul, PRODUCT | {"a": a, "b": b}, constants, hopper.WARPS, 3


def cases(sm):
    """Yield (kernel, argument types, constexpr values, warps, stages)."""
    yield from rounding_cases()
    yield from beam_cases()
    yield from level_cases()
    yield from w4a8_cases()
    yield from quantizing_cases(sm)
    if sm != 100:  # whose products are left to ComfyUI's kernels
        yield from product_cases(sm)
    if sm == 90:
        yield from hopper_cases()


def compiler_options(kernel, warps: int, stages: int) -> dict[str, object]:
    return {"num_warps": warps, "num_stages": stages, **(quantize.SEPARATE if kernel in SEPARATE else {})}


def cache_key(kernel, types, constants, warps, stages, sm) -> str:
    """Of the kernel with all that it calls, the configuration, this compilation, and the releases of Triton and its compiler."""
    code = inspect.getsource(compile_case) + inspect.getsource(compiler_options) + repr(sorted(EVEN))
    options = compiler_options(kernel, warps, stages)
    return make_key(triton.__version__, code, kernel.__name__, kernel.cache_key, types, constants, options, sm)


def compile_case(kernel, types, constants, warps, stages, sm):
    """Compile one case; returns its registers, spilled bytes, shared memory and tensor core instructions."""
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(kernel.arg_names)
        if signature[name][0] == "*" or (name in EVEN and name in types)
    }
    fixed = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source_type = GluonASTSource if kernel.is_gluon() else ASTSource
    source = source_type(fn=kernel, signature=signature, constexprs=fixed, attrs=aligned)
    options = compiler_options(kernel, warps, stages)
    compiled = triton.compile(source, target=GPUTarget("cuda", sm, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        usage = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    registers, stack, local = map(int, re.search(r"REG:(\d+) STACK:(\d+).*?LOCAL:(\d+)", usage.stdout).groups())
    products = sorted(set(re.findall(r"wgmma|mma\.sync", compiled.asm["ptx"])))
    return {"registers": registers, "spilled": stack + local, "shared": compiled.metadata.shared, "products": products}


def main(sm: int) -> None:
    cache = CompileCache(compile_cache_file(sm))
    for kernel, types, constants, warps, stages in cases(sm):
        described = {"kernel": kernel.__name__, **constants, "warps": warps, "stages": stages}
        arguments = kernel, types, constants, warps, stages, sm
        try:
            result = cache.find(cache_key(*arguments), partial(compile_case, *arguments))
        except Exception as error:  # any error of the compiler; the other configurations are compiled too
            result = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(described | result), flush=True)
    cache.save()
    print(f"{cache.hits} results from {cache.file}", file=sys.stderr)


if __name__ == "__main__":
    main(int(sys.argv[1]))
