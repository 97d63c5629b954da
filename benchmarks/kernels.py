"""Benchmark of the 8-bit kernels at the shapes of real models: time, fraction of the roofline, alternatives, error.

``linear``: a linear layer including the quantization of its activations, as speedup over bf16 ``F.linear`` in the same
run. ``_int_mm`` and ``_scaled_mm`` are torch's products without quantization; comfy-kitchen's operators are measured if it
is installed. ``of floor`` is the roofline time of the GPU divided by the layer's time.
``memory``: quantizers and dequantizers, as a fraction of the speed of copying the same number of bytes.
``block``: a double and a single block of Flux.1 (4096 + 512 tokens) in ms, eager and compiled.
Times are those of CUDA graphs, without the time of the host; ``eager`` is the speedup of consecutive calls, the host's time
included. A sampling step is measured by ``comfyui.py``.

``--markdown FILE`` writes the README's tables and the comparison with the goals; ``--read JSON`` uses an earlier result.
``--profile "Flux.1 linear2" "int8 block"`` runs only that layer: ``ncu --set full python benchmarks/kernels.py --profile …``.
"""

import contextlib
import functools
import json
import statistics
import time
from pathlib import Path

import torch
from torch import nn

from learned_rounding import kernels
from learned_rounding.benchmarks.harness import arguments, environment, finish
from learned_rounding.benchmarks.kernels_report import floor, markdown
from learned_rounding.benchmarks.transformer import Transformer
from learned_rounding.kernels.hadamard import rotate

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
INT8, FP8 = torch.int8, torch.float8_e4m3fn
DTYPE = torch.bfloat16 if CUDA else torch.float32
ERROR_TOKENS = 512
EAGER_CALLS = 100

# (model, layer, tokens, out, in)
SHAPES = (
    ("Flux.1", "proj", 4096, 3072, 3072),
    ("Flux.1", "qkv", 4096, 9216, 3072),
    ("Flux.1", "mlp in", 4096, 12288, 3072),
    ("Flux.1", "mlp out", 4096, 3072, 12288),
    ("Flux.1", "linear1", 4608, 21504, 3072),
    ("Flux.1", "linear2", 4608, 3072, 15360),
    ("Flux.1", "text mlp in", 512, 12288, 3072),
    ("Flux.1", "modulation", 1, 18432, 3072),
    ("Flux.2", "proj", 4096, 6144, 6144),
    ("Flux.2", "linear1", 4096, 55296, 6144),
    ("Flux.2", "linear2", 4096, 6144, 24576),
    ("WAN 14B", "proj", 16384, 5120, 5120),
    ("WAN 14B", "mlp in", 16384, 13824, 5120),
    ("WAN 14B", "mlp out", 16384, 5120, 13824),
    ("WAN 14B", "text kv", 512, 5120, 5120),
    ("Qwen-Image", "mlp in", 6032, 12288, 3072),
    ("Qwen-Image", "text proj", 256, 3072, 3072),
    ("SDXL", "attention 640", 4096, 640, 640),
    ("SDXL", "mlp in 640", 4096, 5120, 640),
    ("SDXL", "attention 1280", 1024, 1280, 1280),
    ("SDXL", "mlp in 1280", 1024, 10240, 1280),
    ("SDXL", "mlp out 1280", 1024, 1280, 5120),
)
SECTIONS = ("linear", "memory", "block")
QUICK = (("tiny", "proj", 64, 128, 128), ("tiny", "mlp in", 64, 512, 128), ("tiny", "modulation", 1, 256, 128))

# Name → (weight quantizer, block size, whether the weight is rotated).
FORMATS = {
    "int8 block": (kernels.quantize_int8_block_weight, 128, 0),
    "fp8 block": (kernels.quantize_fp8_block_weight, 128, 0),
    "int8 row": (kernels.quantize_int8_row_weight, 0, 0),
    "int8 row ConvRot": (kernels.quantize_int8_row_weight, 0, True),
    "fp8 row": (kernels.quantize_fp8_row_weight, 0, 0),
}


def measure_microseconds(call) -> float:
    """Median time of a call on the device in µs."""
    if CUDA:
        from triton.testing import do_bench_cudagraph

        return do_bench_cudagraph(call, rep=20, return_mode="median") * 1e3
    times = []
    for _ in range(5):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e6


def measure_eager_microseconds(call) -> float:
    """Mean time of consecutive calls in µs: that of the device or that of the host, whichever is longer."""
    for _ in range(3):
        call()
    if not CUDA:
        return measure_microseconds(call)
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(EAGER_CALLS):
        call()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / EAGER_CALLS * 1e6


def largest_rotation(inner: int) -> int:
    """Largest ConvRot group size that divides ``inner`` channels."""
    return next(size for size in (256, 64, 16) if inner % size == 0)


def quantize(name: str, weight: torch.Tensor) -> tuple:
    """Quantize a weight to one of :data:`FORMATS`; returns qdata, scale, block size and rotation group size."""
    quantize_weight, block_size, rotated = FORMATS[name]
    rotate_by = largest_rotation(weight.shape[1]) if rotated else 0
    weight = rotate(weight, rotate_by) if rotate_by else weight
    return *quantize_weight(weight, *([block_size] if block_size else [])), block_size, rotate_by


def make_layer(name: str, weight: torch.Tensor):
    """Return a function (x, bias) → x·ŵᵀ + bias with the weight in one of :data:`FORMATS`."""
    qdata, scale, block_size, rotate_by = quantize(name, weight)

    def run(x, bias):
        return kernels.scaled_linear(x, qdata, scale, bias, block_size=block_size, rotate_by=rotate_by)

    return run


def make_tensors(tokens: int, out: int, inner: int) -> tuple[torch.Tensor, ...]:
    """Random activations, weight and bias of a linear layer."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    x = torch.randn(tokens, inner, generator=generator, device=DEVICE).to(DTYPE)
    weight = torch.randn(out, inner, generator=generator, device=DEVICE).to(DTYPE) * inner**-0.5
    return x, weight, torch.randn(out, generator=generator, device=DEVICE).to(DTYPE)


def profile(shapes, label: str, name: str) -> None:
    """Run one layer in one format three times; these are the last kernels that a profiler records."""
    shape = next(shape for model, part, *shape in shapes if f"{model} {part}" == label)
    x, weight, bias = make_tensors(*shape)
    run = make_layer(name, weight)
    for _ in range(3):
        run(x, bias)


def make_alternatives(x, weight, bias) -> dict:
    """Name → call: comfy-kitchen's operators and torch's products, as far as they exist."""
    calls = {}
    if not CUDA:
        return calls
    qdata, scale = kernels.quantize_int8_row_weight(weight)
    activations, _ = kernels.quantize_int8_row(x)
    if x.shape[0] > 16:
        calls["_int_mm"] = lambda: torch._int_mm(activations, qdata.t())
        one = torch.ones((), device=DEVICE)
        fp8 = weight.to(FP8)
        calls["_scaled_mm"] = lambda: torch._scaled_mm(x.to(FP8), fp8.t(), one, one, bias=bias, out_dtype=DTYPE)
    with contextlib.suppress(ImportError):
        import comfy_kitchen
        from comfy_kitchen.registry import registry

        def run_with(backend):
            def call():
                with registry.use_backend(backend):
                    return comfy_kitchen.int8_linear(x, qdata, scale, bias, DTYPE)

            return call

        calls["kitchen cuda"], calls["kitchen triton"] = run_with("cuda"), run_with("triton")
    return calls


def measure_linear(model, part, tokens, out, inner) -> dict:
    """Measure a linear layer in every format, and its alternatives."""
    x, weight, bias = make_tensors(tokens, out, inner)
    plain, plain_eager = (
        measure(lambda: nn.functional.linear(x, weight, bias))
        for measure in (measure_microseconds, measure_eager_microseconds)
    )
    row = {"section": "linear", "model": model, "layer": part, "shape": f"{tokens}×{out}×{inner}", "F.linear µs": plain}
    row["F.linear TFLOP/s"] = 2 * tokens * out * inner / plain / 1e6
    few = x[:ERROR_TOKENS]
    exact = nn.functional.linear(few.double(), weight.double(), bias.double())
    least = floor(environment()["device"], tokens, out, inner)
    for name, (_, block_size, _) in FORMATS.items():
        run = make_layer(name, weight)
        call = functools.partial(run, x, bias)
        row[name] = plain / measure_microseconds(call)
        row[f"{name} eager"] = plain_eager / measure_eager_microseconds(call)
        if least:
            row[f"{name} of floor"] = least * row[name] / plain
        if block_size:
            with kernels.using("triton"):
                row[f"{name} triton"] = plain / measure_microseconds(call)
        row[f"{name} error"] = float((run(few, bias).double() - exact).norm() / exact.norm())
    for name, call in make_alternatives(x, weight, bias).items():
        try:
            row[name] = plain / measure_microseconds(call)
        except Exception as error:  # the alternative does not support this shape or GPU
            row[name] = type(error).__name__
    print(".", end="", flush=True)
    return row


def measure_memory(tokens: int, inner: int) -> dict:
    """Measure quantizers and dequantizers, each as a fraction of the speed of copying the same number of bytes."""
    x = torch.randn(tokens, inner, device=DEVICE).to(DTYPE)
    qdata, scale = kernels.quantize_int8_block_weight(x, 128)
    row_qdata, row_scale = kernels.quantize_fp8_row_weight(x)
    calls = {
        "inputs int8 row": lambda: kernels.quantize_int8_row(x),
        "inputs int8 row, rotated": lambda: kernels.quantize_int8_row(x, rotate_by=largest_rotation(inner)),
        "inputs int8 block": lambda: kernels.quantize_int8_block(x, 128),
        "inputs fp8 block": lambda: kernels.quantize_fp8_block(x, 128),
        "weight int8 block": lambda: kernels.quantize_int8_block_weight(x, 128),
        "decode int8 block": lambda: kernels.dequantize_weight(qdata, scale, block_size=128, dtype=DTYPE),
        "decode fp8 row": lambda: kernels.dequantize_weight(row_qdata, row_scale, dtype=DTYPE),
    }
    # Each call moves 3 bytes per value, as does a copy of 1.5 bytes per value.
    source = torch.empty(tokens * inner * (DTYPE.itemsize + 1) // 2, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    copy = measure_microseconds(lambda: target.copy_(source))
    row = {"section": "memory", "shape": f"{tokens}×{inner}", "copy GB/s": 2 * source.numel() / copy / 1e3}
    return row | {name: copy / measure_microseconds(call) for name, call in calls.items()}


class QuantizedLinear(nn.Module):
    """Linear layer in one of :data:`FORMATS`."""

    def __init__(self, original: nn.Linear, name: str):
        super().__init__()
        self.run, self.bias = make_layer(name, original.weight), original.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.run(x, self.bias)


def measure_block(name: str | None, quick: bool) -> dict:
    """Measure a double and a single block with every linear layer in one format, or in bf16 (None)."""
    width, text, image = (128, 16, 64) if quick else (3072, 512, 4096)
    torch.manual_seed(0)
    with torch.device(DEVICE):
        model = Transformer(width, 1, 1).to(DTYPE).requires_grad_(False)
    for parent in [module for module in model.modules() if name]:
        for key, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                setattr(parent, key, QuantizedLinear(child, name))
    streams = [torch.randn(1, tokens, width, device=DEVICE).to(DTYPE) for tokens in (text, image)]
    compiled = torch.compile(model, fullgraph=True, backend="inductor" if CUDA else "eager")
    with torch.inference_mode():
        eager_ms, compiled_ms = (measure_microseconds(lambda run=run: run(*streams)) / 1e3 for run in (model, compiled))
    return {"section": "block", "format": name or "bf16", "eager ms": eager_ms, "compiled ms": compiled_ms}


def blocks(quick: bool) -> list[dict]:
    """Measure the blocks in bf16 and in every format, with speedups over bf16."""
    rows = [measure_block(name, quick) for name in (None, *FORMATS)]
    for row in rows:
        row |= {f"{way} ratio": rows[0][f"{way} ms"] / row[f"{way} ms"] for way in ("eager", "compiled")}
    return rows


def main() -> None:
    """Measure, or read an earlier result, and report."""
    args = arguments(
        __doc__.partition("\n")[0],
        (
            "--profile",
            {
                "nargs": 2,
                "metavar": ("LAYER", "FORMAT"),
                "help": 'run one layer for a profiler, as "Flux.1 proj" "int8 row"',
            },
        ),
        ("--model", {"choices": list(dict.fromkeys(shape[0] for shape in SHAPES)), "help": "shapes of one model only"}),
        ("--only", {"nargs": "+", "choices": SECTIONS, "default": SECTIONS, "help": "sections to measure"}),
        ("--read", {"type": Path, "metavar": "JSON", "help": "report an earlier result instead of measuring"}),
        ("--markdown", {"type": Path, "metavar": "FILE", "help": "write the tables of the README to this file"}),
    )
    shapes = QUICK if args.quick else [shape for shape in SHAPES if args.model in (None, shape[0])]
    if args.profile:
        return profile(shapes, *args.profile)
    if args.read:
        result = json.loads(args.read.read_text(encoding="utf-8"))
    else:
        rows = []
        if "linear" in args.only:
            rows += [measure_linear(*shape) for shape in shapes]
            print()
        if "memory" in args.only:
            sides = dict.fromkeys((shape[2], shape[4]) for shape in shapes if shape[2] > 1)
            rows += [measure_memory(*pair) for pair in sides]
        if "block" in args.only:
            rows += blocks(args.quick)
        finish(args, rows, backend=kernels.backend())
        result = {**environment(), "rows": rows}
    if args.markdown:
        args.markdown.write_text(markdown(result), encoding="utf-8")


if __name__ == "__main__":
    main()
