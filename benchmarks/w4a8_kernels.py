"""Benchmark of W4A8 linear layers at the shapes of Flux.1: times of CUDA graphs in µs, in one run with bf16 and INT8.

``expand`` and ``quantize`` are parts of ``w4a8``: the expansion of the weight, and the rotation and quantization of the
activations. comfy-kitchen's backends are measured if it is installed; "ratio" is the time of ``w4a8`` over that of the INT8
layer with rotation. A sampling step is measured by ``comfyui.py``.
"""

import functools

from torch import nn

from learned_rounding import kernels
from learned_rounding.benchmarks.harness import arguments, finish
from learned_rounding.benchmarks.kernels import QUICK, SHAPES, largest_rotation, make_tensors, measure_microseconds
from learned_rounding.kernels.hadamard import rotate
from learned_rounding.quant_core import quantize_weight

FEW_TOKENS = tuple(
    ("Flux.1", f"{name}, {tokens} tokens", tokens, out, inner)
    for name, out, inner in (("mlp in", 12288, 3072), ("mlp out", 3072, 12288))
    for tokens in (1, 2, 4, 16, 64, 256)
)
BACKENDS = ("cuda", "triton", "eager")  # of comfy-kitchen


def make_alternatives(x, tensors: dict, bias, rotate_by: int) -> dict:
    """Name → call of each of comfy-kitchen's backends."""
    try:
        from comfy_kitchen.registry import registry
    except ImportError:
        return {}
    arguments = {
        "x": x, "qdata": tensors["weight"], "s_rel": tensors["weight_s_rel"], "s_channel": tensors["weight_s_channel"],
        "codebook": tensors["weight_codebook"], "correction": None, "bias": bias, "group_size": 16,
        "convrot_groupsize": rotate_by, "out_dtype": x.dtype,
    }  # fmt: skip
    return {
        f"kitchen {name}": functools.partial(registry.get_implementation("w4a8_int8_linear", backend=name), **arguments)
        for name in BACKENDS
        if registry.is_available(name)
    }


def measure_layer(model: str, part: str, tokens: int, out: int, inner: int) -> dict:
    """Times of one layer in each implementation, and its error against float64."""
    x, weight, bias = make_tensors(tokens, out, inner)
    rotate_by = largest_rotation(inner)
    quantized = quantize_weight(weight, "asym_w4a8_int8", rounding="nearest")
    tensors = {name.partition(".")[2]: tensor.to(x.device) for name, tensor in quantized.tensors("x").items()}
    w4a8 = (tensors["weight"], tensors["weight_s_rel"], tensors["weight_s_channel"], tensors["weight_codebook"])
    int8 = kernels.quantize_int8_row_weight(weight)
    rotated = kernels.quantize_int8_row_weight(rotate(weight, rotate_by))
    calls = {
        "bf16": lambda: nn.functional.linear(x, weight, bias),
        "int8 row": lambda: kernels.int8_row_linear(x, *int8, bias),
        "int8 row, rotated": lambda: kernels.int8_row_linear(x, *rotated, bias, rotate_by=rotate_by),
        "w4a8": lambda: kernels.w4a8_linear(x, *w4a8, bias, rotate_by=rotate_by),
        "expand": lambda: kernels.expand_w4a8_weight(w4a8[0], w4a8[1], w4a8[3]),
        "quantize": lambda: kernels.quantize_int8_row(x, rotate_by=rotate_by),
        **make_alternatives(x, tensors, bias, rotate_by),
    }
    row: dict[str, object] = {"model": model, "layer": part, "shape": f"{tokens}×{out}×{inner}"}
    for name, call in calls.items():
        try:
            row[name] = measure_microseconds(call)
        except Exception as error:  # comfy-kitchen's CUDA backend allocates in ways that CUDA graphs do not capture
            row[name] = type(error).__name__
    few = x[:64]
    exact = nn.functional.linear(few.double(), quantized.dequantize().double().to(x.device), bias.double())
    got = kernels.w4a8_linear(few, *w4a8, bias, rotate_by=rotate_by)
    row["ratio"] = row["w4a8"] / row["int8 row, rotated"]
    row["error"] = float((got.double() - exact).norm() / exact.norm())
    return row


def main() -> None:
    args = arguments(__doc__.partition("\n")[0])
    shapes = QUICK if args.quick else [*(shape for shape in SHAPES if shape[0] == "Flux.1"), *FEW_TOKENS]
    finish(args, [measure_layer(*shape) for shape in shapes], backend=kernels.backend())


if __name__ == "__main__":
    main()
