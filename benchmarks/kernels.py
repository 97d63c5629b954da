"""The 8-bit kernels at the shapes of real models: time, share of what the card could do, rivals in the same run, error.

``linear``: a whole linear layer, quantizing its inputs included, as a ratio to bf16 ``F.linear`` in the same run (above 1
is faster); ``_int_mm`` and ``_scaled_mm`` are torch's bare products of codes; rivals are comfy-kitchen's own operators where
it is installed. ``of floor`` is the least time that the card's peak and its memory allow, as a share of what a layer takes.
``memory``: quantizers and decoders, as a share of what copying as many bytes takes.
``block``: a double and a single block of Flux.1 (4096 + 512 tokens), milliseconds, eager and compiled.
Times are of CUDA graphs: what the card takes, without the launches.

``--markdown FILE`` writes the README's tables and what they say of the goals, with ``--read JSON`` from an earlier result.
``--profile "Flux.1 linear2" "int8 block"`` runs that layer alone, for a profiler: ``ncu --set full python benchmarks/kernels.py --profile …``.
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
QUICK = (("tiny", "proj", 64, 128, 128), ("tiny", "mlp in", 64, 512, 128), ("tiny", "modulation", 1, 256, 128))

# Name → (weight quantizer, block size, whether it is rotated).
FORMATS = {
    "int8 block": (kernels.quantize_int8_block_weight, 128, 0),
    "fp8 block": (kernels.quantize_fp8_block_weight, 128, 0),
    "int8 row": (kernels.quantize_int8_row_weight, 0, 0),
    "int8 row ConvRot": (kernels.quantize_int8_row_weight, 0, True),
    "fp8 row": (kernels.quantize_fp8_row_weight, 0, 0),
}


def microseconds(call) -> float:
    """The median time of a call on the device."""
    if CUDA:
        from triton.testing import do_bench_cudagraph

        return do_bench_cudagraph(call, rep=20, return_mode="median") * 1e3
    times = []
    for _ in range(5):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e6


def rotation(inner: int) -> int:
    """The largest group of ConvRot that divides so many channels."""
    return next(size for size in (256, 64, 16) if inner % size == 0)


def quantized(name: str, weight: torch.Tensor) -> tuple:
    """Codes, scale, block size and rotation of a weight in one of :data:`FORMATS`."""
    quantize, block_size, rotated = FORMATS[name]
    rotate_by = rotation(weight.shape[1]) if rotated else 0
    weight = rotate(weight, rotate_by) if rotate_by else weight
    return *quantize(weight, *([block_size] if block_size else [])), block_size, rotate_by


def layer(name: str, weight: torch.Tensor):
    """A function x → x·ŵᵀ + bias of one of :data:`FORMATS`."""
    codes, scale, block_size, rotate_by = quantized(name, weight)

    def run(x, bias):
        return kernels.scaled_linear(x, codes, scale, bias, block_size=block_size, rotate_by=rotate_by)

    return run


def tensors(tokens: int, out: int, inner: int) -> tuple[torch.Tensor, ...]:
    """Inputs, weight and bias of a linear layer."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    x = torch.randn(tokens, inner, generator=generator, device=DEVICE).to(DTYPE)
    weight = torch.randn(out, inner, generator=generator, device=DEVICE).to(DTYPE) * inner**-0.5
    return x, weight, torch.randn(out, generator=generator, device=DEVICE).to(DTYPE)


def profile(shapes, wanted: str, name: str) -> None:
    """Run one layer in one format three times, and nothing else that a profiler would show after them."""
    shape = next(shape for model, part, *shape in shapes if f"{model} {part}" == wanted)
    x, weight, bias = tensors(*shape)
    run = layer(name, weight)
    for _ in range(3):
        run(x, bias)


def rivals(x, weight, bias) -> dict:
    """Name → a call: comfy-kitchen's operators and torch's products, where they exist."""
    found = {}
    if not CUDA:
        return found
    codes, scale = kernels.quantize_int8_row_weight(weight)
    inputs, _ = kernels.quantize_int8_row(x)
    if x.shape[0] > 16:
        found["_int_mm"] = lambda: torch._int_mm(inputs, codes.t())
        one = torch.ones((), device=DEVICE)
        fp8 = weight.to(FP8)
        found["_scaled_mm"] = lambda: torch._scaled_mm(x.to(FP8), fp8.t(), one, one, bias=bias, out_dtype=DTYPE)
    with contextlib.suppress(ImportError):
        import comfy_kitchen
        from comfy_kitchen.registry import registry

        def through(backend):
            def call():
                with registry.use_backend(backend):
                    return comfy_kitchen.int8_linear(x, codes, scale, bias, DTYPE)

            return call

        found["kitchen cuda"], found["kitchen triton"] = through("cuda"), through("triton")
    return found


def linear(model, part, tokens, out, inner) -> dict:
    """A linear layer in every format, beside its rivals."""
    x, weight, bias = tensors(tokens, out, inner)
    plain = microseconds(lambda: nn.functional.linear(x, weight, bias))
    row = {"section": "linear", "model": model, "layer": part, "shape": f"{tokens}×{out}×{inner}", "F.linear µs": plain}
    row["F.linear TFLOP/s"] = 2 * tokens * out * inner / plain / 1e6
    few = x[:ERROR_TOKENS]
    exact = nn.functional.linear(few.double(), weight.double(), bias.double())
    least = floor(environment()["device"], tokens, out, inner)
    for name, (_, block_size, _) in FORMATS.items():
        run = layer(name, weight)
        call = functools.partial(run, x, bias)
        row[name] = plain / microseconds(call)
        if least:
            row[f"{name} of floor"] = least * row[name] / plain
        if block_size:
            with kernels.using("triton"):
                row[f"{name} triton"] = plain / microseconds(call)
        row[f"{name} error"] = float((run(few, bias).double() - exact).norm() / exact.norm())
    for name, call in rivals(x, weight, bias).items():
        try:
            row[name] = plain / microseconds(call)
        except Exception as error:  # a rival that does not take this shape, on this card
            row[name] = type(error).__name__
    print(".", end="", flush=True)
    return row


def memory(tokens: int, inner: int) -> dict:
    """Quantizers and decoders, each as a share of the speed of a copy of as many bytes."""
    x = torch.randn(tokens, inner, device=DEVICE).to(DTYPE)
    codes, scale = kernels.quantize_int8_block_weight(x, 128)
    row_codes, row_scale = kernels.quantize_fp8_row_weight(x)
    calls = {
        "inputs int8 row": lambda: kernels.quantize_int8_row(x),
        "inputs int8 row, rotated": lambda: kernels.quantize_int8_row(x, rotate_by=rotation(inner)),
        "inputs int8 block": lambda: kernels.quantize_int8_block(x, 128),
        "inputs fp8 block": lambda: kernels.quantize_fp8_block(x, 128),
        "weight int8 block": lambda: kernels.quantize_int8_block_weight(x, 128),
        "decode int8 block": lambda: kernels.dequantize_weight(codes, scale, block_size=128, dtype=DTYPE),
        "decode fp8 row": lambda: kernels.dequantize_weight(row_codes, row_scale, dtype=DTYPE),
    }
    # All of these read and write three bytes a value, a copy of one and a half bytes a value does too.
    source = torch.empty(tokens * inner * (DTYPE.itemsize + 1) // 2, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    copy = microseconds(lambda: target.copy_(source))
    row = {"section": "memory", "shape": f"{tokens}×{inner}", "copy GB/s": 2 * source.numel() / copy / 1e3}
    return row | {name: copy / microseconds(call) for name, call in calls.items()}


class Coded(nn.Module):
    """A linear layer in one of :data:`FORMATS`."""

    def __init__(self, original: nn.Linear, name: str):
        super().__init__()
        self.run, self.bias = layer(name, original.weight), original.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.run(x, self.bias)


def block(name: str | None, quick: bool) -> dict:
    """A double and a single block, every linear layer of them in a format."""
    width, text, image = (128, 16, 64) if quick else (3072, 512, 4096)
    torch.manual_seed(0)
    with torch.device(DEVICE):
        model = Transformer(width, 1, 1).to(DTYPE).requires_grad_(False)
    for parent in [module for module in model.modules() if name]:
        for key, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                setattr(parent, key, Coded(child, name))
    inputs = [torch.randn(1, tokens, width, device=DEVICE).to(DTYPE) for tokens in (text, image)]
    compiled = torch.compile(model, fullgraph=True, backend="inductor" if CUDA else "eager")
    with torch.inference_mode():
        eager_ms, compiled_ms = (microseconds(lambda run=run: run(*inputs)) / 1e3 for run in (model, compiled))
    return {"section": "block", "format": name or "bf16", "eager ms": eager_ms, "compiled ms": compiled_ms}


def blocks(quick: bool) -> list[dict]:
    """The blocks in bf16 and in every format, with ratios to bf16."""
    rows = [block(name, quick) for name in (None, *FORMATS)]
    for row in rows:
        row |= {f"{way} ratio": rows[0][f"{way} ms"] / row[f"{way} ms"] for way in ("eager", "compiled")}
    return rows


def main() -> None:
    """Measure, or read what was measured, and report."""
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
        ("--read", {"type": Path, "metavar": "JSON", "help": "report on an earlier result, measure nothing"}),
        ("--markdown", {"type": Path, "metavar": "FILE", "help": "write the tables of the README"}),
    )
    shapes = QUICK if args.quick else SHAPES
    if args.profile:
        return profile(shapes, *args.profile)
    if args.read:
        result = json.loads(args.read.read_text(encoding="utf-8"))
    else:
        rows = [linear(*shape) for shape in shapes]
        print()
        rows += [memory(*sides) for sides in dict.fromkeys((shape[2], shape[4]) for shape in shapes if shape[2] > 1)]
        rows += blocks(args.quick)
        finish(args, rows, backend=kernels.backend())
        result = {**environment(), "rows": rows}
    if args.markdown:
        args.markdown.write_text(markdown(result), encoding="utf-8")


if __name__ == "__main__":
    main()
