"""A transformer of Flux.1's shapes with random weights: what capturing costs, and how long calibrated rounding takes.

``capture`` runs blocks of linear layers, attention and activation as the model's own are, on random tokens, with and
without a :class:`Collector`; its Grams lie on the device, in low rank, or in files. A run is ``--calls`` calls, as those
of a sampling, and ends when all is learned; the two take turns; median seconds of a run, divided by its calls.
``rounding`` quantizes every layer of the whole model, one after the other, each with a packed Gram of its true size and
512 held-out inputs, which choose the damping; reading the Gram from the disk is not in it. ``measured`` is what it takes to
choose the formats of all layers.
"""

import itertools
import statistics
import tempfile
import time

import torch
from torch import nn

from learned_rounding.benchmarks.harness import arguments, finish
from learned_rounding.benchmarks.transformer import Transformer
from learned_rounding.quant_core import Recipe, quantize_weight
from learned_rounding.quant_core.calibration import Collector, Inputs, LayerInputs, LowRankGram
from learned_rounding.quant_core.calibration.accumulate import FullGram
from learned_rounding.quant_core.calibration.panels import packed_size
from learned_rounding.quant_core.run.allocate import allocate_formats
from learned_rounding.quant_core.sources import TensorSource

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DOUBLE, SINGLE = 19, 38  # blocks of Flux.1
HELD_OUT = 512  # inputs
_ROUNDS = 3
CASES = (
    ("float8_e4m3fn", "tensor", None),
    ("int8_tensorwise", "row", None),
    ("int8_tensorwise", "row", True),
)


def _seconds(call) -> float:
    start = time.perf_counter()
    call()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def capture(args) -> list[dict]:
    width, tokens, blocks = (128, 128, (1, 2)) if args.quick else (3072, 4096, (args.blocks, 2 * args.blocks))
    torch.manual_seed(0)
    with torch.device(DEVICE):
        model = Transformer(width, *blocks).to(torch.bfloat16).requires_grad_(False)
    text, image = (torch.randn(1, count, width, device=DEVICE, dtype=torch.bfloat16) for count in (tokens // 8, tokens))
    layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    rows = []
    for place, device_bytes in (("device", 1 << 40), ("files", 0)):
        for rank in (None, 32) if place == "device" else (None,):
            options = {"device": DEVICE, "device_bytes": device_bytes, "rank": rank}
            with tempfile.TemporaryDirectory() as folder, Collector(layers, folder, **options) as collector:

                def run():
                    for _ in range(args.calls):
                        model(text, image)

                def watched(collector=collector, run=run):
                    with collector.watching(model):
                        run()

                for call in (run, watched):
                    _seconds(call)  # warm up; the second also makes the files
                taken = [[_seconds(call) / args.calls for call in (run, watched)] for _ in range(_ROUNDS)]
                plain, ours = map(statistics.median, zip(*taken, strict=True))
                rows.append(
                    {
                        "section": "capture",
                        "Grams": "low rank" if rank else f"on the {place}" if place == "device" else "in files",
                        "blocks": f"{blocks[0]} + {blocks[1]}",
                        "plain s": plain,
                        "captured s": ours,
                        "ratio": ours / plain,
                        "disk GB": collector.disk_bytes / 1e9,
                    }
                )
    return rows


def _layers(width: int, double: int, single: int):
    for block in range(double):
        for stream in range(2):
            yield from (
                (f"double.{block}.{stream}.{name}", shape)
                for name, shape in (
                    ("qkv", (3 * width, width)),
                    ("proj", (width, width)),
                    ("mlp.0", (4 * width, width)),
                    ("mlp.2", (width, 4 * width)),
                )
            )
    for block in range(single):
        yield f"single.{block}.linear1", (7 * width, width)
        yield f"single.{block}.linear2", (width, 5 * width)


def _inputs(inner: int) -> Inputs:
    """Of random inputs with a falling spectrum: a packed Gram and held-out rows, on the device."""
    generator = torch.Generator(DEVICE).manual_seed(inner)
    gram = FullGram(inner, torch.zeros(packed_size(inner), dtype=torch.float16, device=DEVICE), DEVICE)
    scale = torch.rand(inner, generator=generator, device=DEVICE) + 0.1
    mix = torch.randn(inner // 8, inner, generator=generator, device=DEVICE) / inner**0.5

    def rows(count: int) -> torch.Tensor:
        x = torch.randn(count, inner // 8, generator=generator, device=DEVICE) @ mix
        return (x + 0.3 * torch.randn(count, inner, generator=generator, device=DEVICE)) * scale

    for _ in range(4):
        gram.add(rows(inner))
    return Inputs(gram.result(), LowRankGram(rows(HELD_OUT).t() / HELD_OUT**0.5, torch.zeros(inner)), sensitivity=1.0)


def rounding(args) -> list[dict]:
    width, double, single = (128, 1, 2) if args.quick else (3072, DOUBLE, SINGLE)
    shapes = list(_layers(width, double, single))
    known = {inner: _inputs(inner) for inner in {shape[1] for _, shape in shapes}}
    weights = {
        shape: (0.02 * torch.randn(shape, generator=torch.Generator(DEVICE).manual_seed(0), device=DEVICE)).bfloat16()
        for shape in {shape for _, shape in shapes}
    }
    rows = []
    for format, granularity, convrot in CASES:

        def one(shape, format=format, granularity=granularity, convrot=convrot):
            quantize_weight(
                weights[shape],
                format,
                granularity=granularity,
                convrot=convrot,
                gram=known[shape[1]].gram,
                holdout_gram=known[shape[1]].holdout_gram,
                rounding="calibrated",
            )

        for shape in weights:
            _seconds(lambda shape=shape: one(shape))
        taken = [(name, shape, _seconds(lambda shape=shape: one(shape))) for name, shape in shapes]
        rows.append(
            {
                "section": "rounding",
                "format": format,
                "per": granularity + (", rotated" if convrot else ""),
                "layers": len(shapes),
                "weights GB": sum(out * inner for _, (out, inner) in shapes) * 2 / 1e9,
                "seconds": sum(seconds for *_, seconds in taken),
                "slowest": max(seconds for *_, seconds in taken),
            }
        )
    source = TensorSource({f"{name}.weight": weights[shape] for name, shape in shapes})
    calibration = LayerInputs({name: known[shape[1]] for name, shape in shapes})
    recipe = Recipe(format="measured")
    nothing = {"emit": lambda event: None, "check": lambda: None}
    seconds = _seconds(lambda: allocate_formats(source, recipe, calibration, device=DEVICE, **nothing))
    rows.append({"section": "measured", "layers": len(shapes), "seconds": seconds})
    return rows


def main() -> None:
    args = arguments(
        __doc__.splitlines()[0],
        (
            "--blocks",
            {"type": int, "default": 2, "help": "double blocks of the capture section, and twice as many single ones"},
        ),
        (
            "--calls",
            {
                "type": int,
                "default": 24,
                "help": "calls in a run of the capture section (default: 24, three turns of files)",
            },
        ),
    )
    with torch.no_grad():
        finish(args, list(itertools.chain(capture(args), rounding(args))))


if __name__ == "__main__":
    main()
